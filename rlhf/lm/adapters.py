"""Several LoRA adapters on one frozen backbone: policy, critic, reward model, and the reference with all of them off.

One copy of the large weights serves all four; only the small matrices differ.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

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


def add_critic_adapter(model: Any, *, settings: Any = None, weights: Mapping[str, Tensor] | None = None) -> None:
    """Put a second adapter onto a PEFT model, trained beside the policy's.

    Args:
        model: The policy's PEFT model.
        settings: A LoraConfig; None takes the shape of the policy's adapter.
        weights: To start from, as PEFT saves them; None starts as the backbone alone.

    Raises:
        ModelError: The model has no adapters or checkpoints its activations, or the weights do not fit.
    """
    require_adapters(model, where="critic")
    if unwrap_adapters(model).is_activation_checkpointing:
        # The layers would be recomputed in backward, after the switch went back to the policy's adapter.
        raise ModelError(
            "gradient checkpointing would recompute the critic's layers with the policy's adapter",
            where="critic",
            got="adapter",
            remedy="Set model.gradient_checkpointing=false, or critic: head.",
        )
    _add(model, CRITIC, model.peft_config[POLICY] if settings is None else settings)
    if weights is not None:
        _fill(model, CRITIC, weights, settings=settings)
    _require_gradient(model, CRITIC, True)


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
    require_adapters(model, where=f"adapter {name!r}")
    _add(model, name, settings)
    _fill(model, name, weights, settings=settings)
    _require_gradient(model, name, False)


def _add(model: Any, name: str, settings: Any) -> None:
    """A fresh adapter; what asked for gradients before still does, whatever PEFT's version thinks of it."""
    settings = copy.deepcopy(settings)
    settings.modules_to_save, settings.inference_mode = None, False
    settings.task_type = model.peft_config[POLICY].task_type
    asked = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter(name, settings)
    for key, parameter in model.named_parameters():
        if key in asked:
            parameter.requires_grad_(True)
    unwrap_adapters(model).eval()


def _fill(model: Any, name: str, weights: Mapping[str, Tensor], *, settings: Any) -> None:
    from peft import set_peft_model_state_dict

    _require_same_backbone(model, settings, name)
    lora = {key: tensor for key, tensor in weights.items() if ".lora_" in key}
    own = [key for key, _ in model.named_parameters() if f".{name}." in key]
    try:
        outcome = set_peft_model_state_dict(model, lora, adapter_name=name)
    except RuntimeError as error:
        raise ModelError(
            "the adapter was trained on a model of other sizes", where=f"adapter {name!r}", got=str(error)
        ) from error
    if outcome.unexpected_keys or len(own) != len(lora):
        raise ModelError(
            "the adapter was trained on another backbone",
            where=f"adapter {name!r}",
            got=f"{len(lora)} tensors for the {len(own)} places of this model",
            remedy="Train the reward model with LoRA on the model that the policy starts from.",
        )


def _require_same_backbone(model: Any, settings: Any, name: str) -> None:
    """Low-rank changes to other weights would be noise, and their shapes do not tell."""
    trained_on, here = str(settings.base_model_name_or_path or ""), str(unwrap_adapters(model).name_or_path or "")
    if Path(trained_on).resolve() != Path(here).resolve():
        raise ModelError(
            "the adapter was trained on another backbone",
            where=f"adapter {name!r}",
            got=here or "a fresh model",
            expected=trained_on or "a model that was saved before",
            remedy="Train the reward model with LoRA on the model that the policy starts from. If that folder has only "
            "moved, correct base_model_name_or_path in adapter_config.json.",
        )


def _require_gradient(model: Any, name: str, wanted: bool) -> None:
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(wanted)


class AdapterCritic(nn.Module):
    """The policy's own body, seen through the critic's adapter: a critic trunk without weights of its own.

    Args:
        model: The policy's PEFT model, which has a critic adapter.
        head: The value head to start with; None starts at zero.
    """

    def __init__(self, model: Any, *, head: nn.Linear | None = None) -> None:
        super().__init__()
        base = unwrap_adapters(model)
        # In a list, so that the policy's parameters are not registered a second time.
        self._shared = [model, getattr(base, base.base_model_prefix)]
        self._switch = AdapterSwitch(model)
        if head is None:
            head = nn.Linear(base.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self._start_head = [head]

    def start_head(self) -> nn.Linear:
        """The value head, which belongs to the policy's module from now on."""
        return self._start_head.pop()

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
