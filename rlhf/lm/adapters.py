"""Several LoRA adapters on one frozen backbone: policy, critic, reward model, and the reference with all of them off.

One copy of the large weights serves all four; only the small matrices differ.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf.errors import ModelError
from rlhf.lm.backbone import takes_positions, unwrap_adapters

POLICY, CRITIC, REWARD = "default", "critic", "reward"
"""Names of the adapters; `default` is PEFT's name for the first one, which `add_lora` makes."""

AdapterName = Literal["default", "critic", "reward"]


class AdapterSwitch:
    """Chooses the adapter that a PEFT model computes with.

    PEFT's own `set_adapter` and `disable_adapter` also change which parameters ask for gradients: after a pass of the
    reference with `disable_adapter`, only the *active* adapter would train on, and the critic's would be frozen
    silently. This switch changes what is computed and nothing else.

    Args:
        model: A PEFT model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def _layers(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        return [module for module in self._model.modules() if isinstance(module, kinds)]

    @contextmanager
    def only(self, name: AdapterName | None) -> Iterator[None]:
        """Compute with this adapter inside; None is the backbone alone."""
        layers = self._layers()
        before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = name is None
                if name is not None:
                    layer._active_adapter = [name]
            yield
        finally:
            for layer, (active, disabled) in zip(layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled


def require_adapters(model: Any, *, where: str) -> None:
    """Refuse a model without adapters.

    Raises:
        ModelError: It is a plain model.
    """
    if not hasattr(model, "peft_config"):
        raise ModelError(
            "an adapter shares the policy's backbone, which must be frozen under LoRA itself",
            where=where,
            remedy="Set model.lora, or take a critic or reward model with weights of its own.",
        )


def add_critic_adapter(model: Any) -> None:
    """Put a second, fresh adapter onto a PEFT model, of the policy adapter's shape; both are trained.

    Raises:
        ModelError: The model has no adapters, or checkpoints its activations.
    """
    require_adapters(model, where="critic")
    if unwrap_adapters(model).is_gradient_checkpointing:
        # The layers would be recomputed in backward, after the switch went back to the policy's adapter.
        raise ModelError(
            "gradient checkpointing would recompute the critic's layers with the policy's adapter",
            where="critic",
            got="adapter",
            remedy="Set model.gradient_checkpointing=false, or critic: head.",
        )
    settings = copy.deepcopy(model.peft_config[POLICY])
    settings.modules_to_save = None
    _add(model, CRITIC, settings)
    for name, parameter in model.named_parameters():
        if f".{CRITIC}." in name:
            parameter.requires_grad_(True)


def add_frozen_adapter(model: Any, settings: Any, weights: Mapping[str, Tensor], *, name: AdapterName) -> None:
    """Put trained LoRA weights onto a PEFT model as one more adapter, which stays as it is.

    Args:
        model: A PEFT model of the same architecture as the one the adapter was trained on.
        settings: The adapter's LoraConfig.
        weights: Its saved weights, as PEFT names them; those of whole layers (`modules_to_save`) are not read.
        name: Of the new adapter.

    Raises:
        ModelError: The weights do not belong to this backbone.
    """
    from peft import set_peft_model_state_dict

    require_adapters(model, where=f"adapter {name!r}")
    settings = copy.deepcopy(settings)
    settings.modules_to_save, settings.inference_mode = None, True
    settings.task_type = model.peft_config[POLICY].task_type
    _add(model, name, settings)
    lora = {key: tensor for key, tensor in weights.items() if ".lora_" in key}
    try:
        outcome = set_peft_model_state_dict(model, lora, adapter_name=name)
    except RuntimeError as error:
        raise ModelError(
            "the adapter was trained on a model of other sizes", where=f"adapter {name!r}", got=str(error)
        ) from error
    own = [key for key, _ in model.named_parameters() if f".{name}." in key]
    if outcome.unexpected_keys or len(own) != len(lora):
        raise ModelError(
            "the adapter was trained on another backbone",
            where=f"adapter {name!r}",
            got=f"{len(lora)} tensors for the {len(own)} places of this model",
            remedy="Train the reward model with LoRA on the model that the policy starts from.",
        )
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(False)


def _add(model: Any, name: str, settings: Any) -> None:
    """PEFT's `add_adapter` freezes the other adapters in some versions: keep what asked for gradients before."""
    asked = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter(name, settings)
    for key, parameter in model.named_parameters():
        if key in asked:
            parameter.requires_grad_(True)
    unwrap_adapters(model).eval()


class AdapterCritic(nn.Module):
    """The policy's own body, seen through the critic's adapter: a critic trunk without weights of its own.

    Args:
        model: The policy's PEFT model, which has a critic adapter.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        base = unwrap_adapters(model)
        # In a list, so that the policy's parameters are not registered a second time.
        self._shared = [model, getattr(base, base.base_model_prefix)]
        self._switch = AdapterSwitch(model)
        self.width: int = base.config.get_text_config().hidden_size

    def forward(
        self, *, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False
    ) -> tuple[Tensor, ...]:
        """Hidden states [B, S, H] under the critic's adapter, first of a tuple as transformers' bodies give them."""
        knows = takes_positions(type(self._shared[1]))
        arguments = {"position_ids": position_ids} if knows and position_ids is not None else {}
        with self._switch.only(CRITIC):
            return (self._shared[1](input_ids=input_ids, use_cache=use_cache, **arguments)[0],)

    def save_pretrained(self, folder: Any) -> None:
        """Nothing: the critic's adapter is written with the model, into the folder of its name."""


@torch.no_grad()
def copy_adapter(model: Any, *, source: AdapterName, target: AdapterName) -> None:
    """Give one adapter the weights of another, as where a critic starts from the reward model.

    Raises:
        ModelError: The two differ in rank or in the layers they sit on.
    """
    weights = dict(model.named_parameters())
    names = [name for name in weights if f".{target}." in name]
    for name in names:
        origin = weights.get(name.replace(f".{target}.", f".{source}."))
        if origin is None or origin.shape != weights[name].shape:
            raise ModelError(
                f"the {source} adapter has another shape than the {target}'s",
                where=name,
                got=None if origin is None else tuple(origin.shape),
                expected=str(tuple(weights[name].shape)),
                remedy="Train the reward model with the rank and target_modules of the policy's adapter.",
            )
        weights[name].copy_(origin)
