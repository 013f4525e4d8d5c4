"""The language model as a policy: log-probs and entropy of given completion tokens, and values from a critic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.core.types import PolicyOutput
from rlhf.data.tokenizer_saving import save_tokenizer
from rlhf.errors import DataError, ModelError
from rlhf.lm.adapters import CRITIC, POLICY, AdapterCritic
from rlhf.lm.backbone import split_model, takes_positions, unwrap_adapters
from rlhf.lm.fused_training_probe import exact_fused_pass
from rlhf.lm.log_probs import selected_log_probs
from rlhf.lm.token_layout import lay_out
from rlhf.training.linear import use_fast_linear

VALUE_HEAD_FILE = "value_head.safetensors"
CRITIC_FOLDER = "critic"


class LanguageModelPolicy(nn.Module):
    """A causal language model that scores completions, with an optional critic in the same module.

    Dropout is off always, in training too: with it the sampling policy and the trained policy would be two
    distributions, and the importance ratio would not be 1 at the first step (1909.08593, p. 3).

    Args:
        model: A causal language model, bare or with LoRA adapters.
        critic: `none`; `head` (a linear value head on the policy's own hidden states, zero-initialised, so that
            the first advantages are the rewards themselves); or a model of its own: a causal language model (gets
            a zero-initialised value head) or a sequence classifier with one label, such as a reward model (its
            head becomes the value head, as in InstructGPT, https://arxiv.org/abs/2203.02155, appendix C.4); or an
            `AdapterCritic`, an adapter of its own on the policy's backbone.
        temperature: Sampling temperature; log-probs and entropy are those of softmax(logits / temperature).
        chunk_tokens: Positions whose logits are held at once; None chooses by vocabulary and device.

    Raises:
        ModelError: A model whose logits cannot be repeated from its hidden states, or an unusable critic.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        critic: Literal["none", "head"] | PreTrainedModel | AdapterCritic = "none",
        temperature: float = 1.0,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ModelError("the temperature of a policy must be above 0", got=temperature, remedy="1.0 is usual.")
        self.temperature = float(temperature)
        self.chunk_tokens = chunk_tokens
        self.model = model
        self._parts = split_model(model)
        # Padding on the right is never attended to; as an ordinary token it raises no warnings about masks either.
        self._fill_id = 1 if self._parts.config.pad_token_id == 0 else 0
        self.critic: nn.Module | None = None
        self.value_head: nn.Linear | None = None
        if isinstance(critic, AdapterCritic):
            self.critic, self.value_head = critic, critic.start_head().to(model.device)
        elif isinstance(critic, nn.Module):
            self.critic, self.value_head = _split_critic(critic)
            _require_same_vocabulary(self._parts.config, critic.config)
        elif critic == "head":
            self.value_head = _zero_head(self._parts.config.hidden_size).to(model.device)
        elif critic != "none":
            raise ModelError("unknown critic", got=critic, expected="'none', 'head', or a model")
        use_fast_linear(self)
        self.train()

    @property
    def has_critic(self) -> bool:
        """Whether `forward` returns values."""
        return self.value_head is not None

    def critic_parameters(self) -> set[str]:
        """Names of the parameters that serve the values alone; a trunk shared with the policy is not among them."""
        own = ("value_head.", "critic.")
        adapter = f".{CRITIC}." if isinstance(self.critic, AdapterCritic) else None
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and (name.startswith(own) or (adapter is not None and adapter in name))
        }

    def train(self, mode: bool = True) -> LanguageModelPolicy:
        """Set the mode of this module; the language models inside stay in eval mode.

        Eval mode is the one switch that turns off dropout (and router noise) in every architecture. Gradient
        checkpointing looks at the flag of each layer itself, which alone is set; see `_keep_checkpointing`.
        """
        super().train(mode)
        for inner in (self.model, self.critic):
            if inner is not None:
                inner.eval()
                if mode:
                    _keep_checkpointing(inner)
        return self

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        actions: Tensor,
        *,
        temperature: float | None = None,
        with_values: bool = True,
    ) -> PolicyOutput:
        """Score completions.

        Rows are packed to the left first (prompt, completion, padding), which trims the batch to its longest row
        and makes a plain causal mask correct: no token sees padding, whatever side it came from. The body then
        sees every token but the last, and the head only the positions that predict a completion token.

        Args:
            inputs: `prompt_ids` [B, P] int64; `prompt_mask` [B, P] bool, True on prompt tokens;
                `completion_mask` [B, T] bool, True on tokens the model attended to (tool tokens included).
            actions: [B, T] completion token ids; where the mask is False any value is fine.
            temperature: Instead of the policy's own; texts that nobody sampled are scored at 1.
            with_values: False leaves the values out, and a critic with a body of its own is not run.

        Returns:
            log-probs, entropy and values [B, T], float32; 0 where `completion_mask` is False.

        Raises:
            DataError: A row has completion tokens but no prompt token to predict the first one from.
        """
        packed = pack_rows(inputs, actions, fill_id=self._fill_id)
        shape = actions.shape
        log_probs, entropy, selected = self._score(packed, temperature=temperature)
        values = None
        if self.value_head is not None and with_values:
            if self.critic is not None:
                selected = _hidden_states(self.critic, packed)
            values = _scatter(self._values(selected), packed.places, shape)
        return PolicyOutput(_scatter(log_probs, packed.places, shape), _scatter(entropy, packed.places, shape), values)

    def action_log_probs(self, inputs: Mapping[str, Tensor], actions: Tensor) -> Tensor:
        """The log-probs of `forward` alone, [B, T]: no critic is run."""
        packed = pack_rows(inputs, actions, fill_id=self._fill_id)
        return _scatter(self._score(packed)[0], packed.places, actions.shape)

    def action_values(self, inputs: Mapping[str, Tensor], actions: Tensor) -> Tensor:
        """The values of `forward` alone, [B, T]: where the critic has a body of its own, the policy is not run.

        Raises:
            ModelError: The policy has no critic of its own.
        """
        if self.critic is None:
            raise ModelError("this policy has no critic with a body of its own", remedy="Call the policy itself.")
        packed = pack_rows(inputs, actions, fill_id=self._fill_id)
        return _scatter(self._values(_hidden_states(self.critic, packed)), packed.places, actions.shape)

    def row_lengths(self, inputs: Mapping[str, Tensor], action_mask: Tensor) -> Tensor:
        """[B] tokens that `forward` processes for each row, for sorting rows and for token budgets."""
        del action_mask  # tokens that are attended but not the policy's own cost time too
        return inputs["prompt_mask"].sum(dim=1) + inputs["completion_mask"].sum(dim=1)

    def save(self, folder: str | Path, *, tokenizer: Any = None) -> None:
        """Write an ordinary model folder; what is not part of a causal language model lies beside it.

        `AutoModelForCausalLM.from_pretrained(folder)` opens it (adapters included). The value head goes to
        `value_head.safetensors`, a separate critic's trunk to `critic/`.
        """
        folder = Path(folder)
        # A reward model's adapter on the same backbone is not the policy's to save.
        trained = [POLICY, CRITIC] if isinstance(self.critic, AdapterCritic) else [POLICY]
        self.model.save_pretrained(
            folder, **({"selected_adapters": trained} if hasattr(self.model, "peft_config") else {})
        )
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        if self.value_head is not None:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.value_head.state_dict().items()}
            save_file(state, folder / VALUE_HEAD_FILE, metadata={"format": "pt"})
        if self.critic is not None:
            self.critic.save_pretrained(folder / CRITIC_FOLDER)

    def load_value_head(self, folder: str | Path) -> None:
        """Read the value head that `save` wrote.

        Raises:
            ModelError: There is none, its width differs, or this policy has no critic.
        """
        path = Path(folder) / VALUE_HEAD_FILE
        if self.value_head is None:
            raise ModelError("this policy has no critic to load a value head into", where=str(path))
        if not path.is_file():
            raise ModelError("no value head in this folder", where=str(path), remedy="Save the policy with its critic.")
        try:
            self.value_head.load_state_dict(load_file(path))
        except RuntimeError as error:
            raise ModelError("the value head does not fit this policy", where=str(path), got=str(error)) from error

    def _score(self, packed: PackedRows, *, temperature: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs [N], entropy [N] and hidden states [N, H] of the completion tokens."""
        selected = _hidden_states(self._parts.body, packed)
        log_probs, entropy = selected_log_probs(
            selected,
            self._parts.head,
            packed.targets,
            temperature=self.temperature if temperature is None else temperature,
            chunk_tokens=self.chunk_tokens,
        )
        return log_probs, entropy, selected

    def _values(self, selected: Tensor) -> Tensor:
        """[N] values in float32, also under autocast: bfloat16 would round returns of 10 to steps of 0.06."""
        assert self.value_head is not None
        with torch.autocast(selected.device.type, enabled=False):
            return self.value_head(selected.to(self.value_head.weight.dtype)).squeeze(1)


class PackedRows(NamedTuple):
    """A batch of prompts and completions with all padding on the right."""

    ids: Tensor
    """[B, S] tokens the body reads; the last token of the longest row is left out, nothing follows it."""
    sources: Tensor
    """[N] index into the flattened [B * S] of the position that predicts each completion token."""
    targets: Tensor
    """[N] the completion tokens."""
    places: Tensor
    """[N] index of each completion token in the flattened [B * T]."""
    lengths: Tensor
    """[B] tokens of each row that something is predicted from."""
    prompt_lengths: Tensor
    """[B] how many of them are prompt."""


def pack_rows(inputs: Mapping[str, Tensor], actions: Tensor, *, fill_id: int = 0) -> PackedRows:
    """Move the real tokens of each row to the left and say where each completion token is predicted.

    Raises:
        DataError: A completion without a prompt token before it.
    """
    prompt_mask, completion_mask = inputs["prompt_mask"], inputs["completion_mask"]
    mask = torch.cat([prompt_mask, completion_mask], dim=1)  # [B, P + T]
    ids = torch.cat([inputs["prompt_ids"], actions], dim=1).masked_fill(~mask, fill_id)
    lengths = mask.sum(dim=1)
    # One transfer decides the width and checks the prompts.
    without_prompt = (~prompt_mask.any(dim=1)) & completion_mask.any(dim=1)
    bad_row = torch.where(without_prompt.any(), without_prompt.int().argmax(), -1)
    width, bad_row = torch.stack([lengths.amax(), bad_row]).tolist()
    if bad_row >= 0:
        raise DataError(
            "a completion without a prompt has nothing that predicts its first token",
            where=f"row {bad_row}",
            remedy="Give every prompt at least one token, for instance the tokenizer's bos token.",
        )
    width = max(width - 1, 1)
    order = torch.argsort(~mask, dim=1, stable=True)[:, :width]  # real tokens first, in their order
    positions = (mask.cumsum(dim=1) - 1)[:, prompt_mask.shape[1] :]  # [B, T] where each completion token went
    places = completion_mask.flatten().nonzero().squeeze(1)
    rows = torch.arange(len(mask), device=mask.device)[:, None] * width
    sources = (rows + positions - 1).flatten().index_select(0, places)
    lengths, prompt_lengths = (lengths - 1).clamp(1, width), prompt_mask.sum(dim=1).clamp(max=width)
    targets = actions.flatten().index_select(0, places)
    return PackedRows(
        ids.gather(1, order), sources, targets, places, torch.max(lengths, prompt_lengths), prompt_lengths
    )


def _hidden_states(body: nn.Module, packed: PackedRows) -> Tensor:
    """[N, H] hidden states of the positions that predict completion tokens."""
    fused = exact_fused_pass(body)
    if fused is not None:
        layout = lay_out(packed.ids, packed.lengths, packed.prompt_lengths)
        return fused(layout, layout.token_of_place[packed.sources])
    positions = torch.arange(packed.ids.shape[1], device=packed.ids.device)[None]
    arguments = {"position_ids": positions} if takes_positions(type(body)) else {}
    hidden = body(input_ids=packed.ids, use_cache=False, **arguments)[0]
    return hidden.flatten(0, 1).index_select(0, packed.sources)


def _scatter(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """[N] values to their places in a [B, T] tensor of zeros."""
    return values.new_zeros(shape.numel()).index_copy(0, places, values).view(shape)


def _zero_head(width: int) -> nn.Linear:
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _split_critic(critic: Any) -> tuple[nn.Module, nn.Linear]:
    """Body and value head of a critic model; a one-label classifier brings its own head."""
    base = unwrap_adapters(critic)
    body = getattr(base, base.base_model_prefix, None)
    score = getattr(base, "score", None)
    if body is None or body is base:
        raise ModelError("the critic has no separate body", got=type(base).__name__)
    if score is None:
        split_model(critic)  # refuses models whose hidden states need more than the body
        return body, _zero_head(base.config.get_text_config().hidden_size).to(base.device)
    if not isinstance(score, nn.Linear) or score.out_features != 1:
        raise ModelError(
            "a critic made from a classifier needs one label",
            got=getattr(score, "out_features", type(score).__name__),
            expected="a reward model: AutoModelForSequenceClassification with num_labels=1",
        )
    head = nn.Linear(score.in_features, 1, bias=score.bias is not None, device=base.device)
    head.load_state_dict({name: tensor.float() for name, tensor in score.state_dict().items()})
    return body, head


def _require_same_vocabulary(policy_config: Any, critic_config: Any) -> None:
    """The critic reads the policy's tokens; another vocabulary would give meaningless values without an error."""
    critic_size = critic_config.get_text_config().vocab_size
    if critic_size != policy_config.vocab_size:
        raise ModelError(
            "policy and critic read the same tokens but their vocabularies differ",
            got=critic_size,
            expected=str(policy_config.vocab_size),
            remedy="Take a critic with the policy's tokenizer, or critic: head. A reward model may differ.",
        )


def _keep_checkpointing(model: nn.Module) -> None:
    """Set the training flag of checkpointed layers only, not of the dropout modules inside them.

    Some layers (OPT, BLOOM) call functional dropout with their own flag, so their own rates are set to 0.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = True
            for name, value in vars(layer).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)
