"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.config import Config


class SftConfig(Config):
    """How demonstrations are imitated."""

    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate of AdamW."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How it falls over the run, to 0 at its end."""
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    """Share of the run in which the learning rate rises to its peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient of all parameters together is scaled down to this norm."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the demonstrations; not used where `max_steps` is set."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps, instead of `epochs`."""
    batch_size: int = Field(32, ge=1)
    """Demonstrations (packed rows with `packing`) per optimizer step, over all processes."""
    microbatch_size: int | None = Field(None, ge=1)
    """Most rows in one forward of one process; None takes its whole share. Changes memory, not gradients."""
    max_length: int = Field(1024, ge=2)
    """Most tokens of prompt and completion together; the length of a packed row."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a longer demonstration. Cutting is not offered: it would teach answers without an end."""
    packing: bool = False
    """Put several demonstrations into one row; they do not see one another. Pays with flash attention on a GPU."""
    completion_only: bool = True
    """Learn the completion only, not the prompt."""
    assistant_only: bool = False
    """Learn every turn of the assistant's in a conversation, those inside the prompt too, and nothing else."""
    neftune_noise: float | None = Field(None, gt=0)
    """NEFTune (https://arxiv.org/abs/2310.05914): uniform noise on the embeddings while training, of magnitude
    neftune_noise / sqrt(tokens x width); 5 is the paper's. Null adds none."""
    patience: int | None = Field(None, ge=1)
    """End the run after so many evaluations in a row that were not better than the best one; null never does.
    Evaluations come every `run.evaluate_every` steps, and `run.best_metric` says what counts (the held-out loss where
    it is null). The best model is kept in `<run directory>/model_best`, the last one in `model`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Mixed precision; auto is bfloat16 on a GPU that has it, else float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""

    @model_validator(mode="after")
    def _refuse_what_does_not_fit(self) -> Self:
        if self.microbatch_size is not None and self.batch_size % self.microbatch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of microbatch_size {self.microbatch_size}; make it one"
            )
        if self.assistant_only and not self.completion_only:
            raise ValueError(
                "assistant_only learns no prompt, completion_only: false learns all of it; set one of them"
            )
        return self
