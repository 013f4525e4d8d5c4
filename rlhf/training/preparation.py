"""Getting a policy ready to be trained, and its state in and out."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from rlhf.core.algorithm import AlgorithmConfig, TokenMean
from rlhf.errors import ConfigError, ModelError
from rlhf.training.optimizer import FlatParameters, PolicyOptimizer, build_optimizer, place_like, whole
from rlhf.training.update_config import UpdateConfig


def prepare_policy(
    policy: nn.Module, update: UpdateConfig, accelerator: Accelerator
) -> tuple[nn.Module, PolicyOptimizer]:
    """The module to call (wrapped where there are several processes or autocast) and its optimizer."""
    if update.flatten_parameters:
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ConfigError(
                "sharded parameters cannot be views of one flat tensor",
                where="update.flatten_parameters",
                remedy="Set it to false; it is meant for small policies, which need no FSDP.",
            )
        model = accelerator.prepare_model(policy, evaluation_mode=True)  # device and autocast; no DDP: one all-reduce
        named = _trainable(policy)
        flat = FlatParameters(named)
        if hasattr(policy, "attach_flat"):
            policy.attach_flat(flat)  # type: ignore[operator]
        if accelerator.num_processes > 1:
            for tensor in (flat.parameter.data, *policy.buffers()):
                dist.broadcast(tensor, src=0)
        return model, PolicyOptimizer(build_optimizer([flat.parameter], update), named_parameters=named, flat=flat)
    if accelerator.num_processes == 1 and accelerator.mixed_precision == "no":
        model = policy.to(accelerator.device)
        named = _trainable(policy)
        return model, PolicyOptimizer(build_optimizer(_only(named), update), named_parameters=named)
    model, prepared = accelerator.prepare(policy, build_optimizer(_only(_trainable(policy)), update))
    # accelerate's wrapper around the optimizer only adds loss scaling and accumulation, which we do ourselves.
    return model, PolicyOptimizer(prepared.optimizer, named_parameters=_trainable(policy))


def _trainable(policy: nn.Module) -> list[tuple[str, nn.Parameter]]:
    named = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    if not named:
        raise ModelError("the policy has no trainable parameter", remedy="Unfreeze what should learn.")
    return named


def _only(named: list[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    return [parameter for _, parameter in named]


def refuse_contradictions(algorithm: AlgorithmConfig, update: UpdateConfig, policy: nn.Module) -> None:
    """Refuse `shuffle: actions` where a row means something; a policy with a memory says `needs_rows`."""
    if update.shuffle == "rows":
        return
    if getattr(policy, "needs_rows", False):
        raise ConfigError(
            "single actions cannot be shuffled when the policy remembers what came before them",
            where="update.shuffle",
            got="actions",
            expected="rows",
        )
    if algorithm.ratio != "token" or not isinstance(algorithm.aggregation, TokenMean):
        raise ConfigError(
            "single actions cannot be shuffled when the loss is made per row",
            where="update.shuffle",
            got=f"ratio {algorithm.ratio}, aggregation {algorithm.aggregation.type}",
            expected="ratio token and aggregation token_mean",
            remedy="Set update.shuffle=rows.",
        )


def critic_names(policy: nn.Module, *, flat: bool) -> set[str]:
    """Names of the parameters that a critic's warm-up trains.

    Args:
        policy: Offers `critic_parameters() -> set of names`.
        flat: Whether parameters are flattened.

    Raises:
        ConfigError: The critic cannot be trained alone.
    """
    names = policy.critic_parameters() if hasattr(policy, "critic_parameters") else set()  # type: ignore[operator]
    if flat or not names:
        raise ConfigError(
            "the critic cannot be trained alone",
            where="critic warm-up",
            got="update.flatten_parameters=true" if flat else f"{type(policy).__name__} without critic_parameters()",
            remedy="Set update.flatten_parameters=false." if flat else "Set the warm-up to 0.",
        )
    return names


def refuse_dropout(policy: nn.Module) -> None:
    """Dropout draws anew in every forward, so that ratios would differ from 1 before the first step."""
    for name, module in policy.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ModelError(
                "dropout makes the importance ratios wrong",
                where=f"policy.{name}",
                got=f"p={module.p}",
                remedy="Set the model's dropout probabilities to 0.",
            )


def policy_state(policy: nn.Module) -> dict[str, Any]:
    """Return what a checkpoint keeps of a policy, on the CPU.

    Frozen parameters (the model under a LoRA adapter) are not stored: they come back from where they came from. A
    fingerprint of each tells on loading whether they did.

    Returns:
        "learned": {name: tensor} of trainable parameters and buffers; "frozen": {name: fingerprint}.
    """
    learned: dict[str, Tensor] = {}
    frozen: dict[str, float] = {}
    for name, tensor in policy.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            frozen[name] = _fingerprint(tensor)
        else:  # a copy, because a view of a flat tensor would save all of it
            learned[name] = whole(tensor.detach()).cpu().clone()
    return {"learned": learned, "frozen": frozen}


def load_policy_state(policy: nn.Module, saved: dict[str, Any]) -> None:
    """Copy a saved state into the policy's own tensors.

    Raises:
        ConfigError: It has other names, shapes, or frozen weights.
    """
    own, learned, frozen = policy.state_dict(keep_vars=True), saved["learned"], saved["frozen"]
    different = [name for name in {**own, **learned, **frozen} if name not in own or name not in {**learned, **frozen}]
    different += [name for name in learned if name in own and own[name].shape != learned[name].shape]
    different += [name for name in frozen if name in own and _fingerprint(own[name]) != frozen[name]]
    if different:
        raise ConfigError(
            "the checkpoint's weights belong to another policy",
            got=", ".join(sorted(different)[:5]),
            remedy="Resume with the model and settings that the run was started with.",
        )
    with torch.no_grad():
        for name, tensor in learned.items():
            own[name].copy_(place_like(tensor, own[name]))


def _fingerprint(tensor: Tensor) -> float:
    """A float64 sum: equal for equal weights on one machine, and next to never for different ones."""
    return whole(tensor.detach()).double().sum().item()
