"""Settings of the prompt collector."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.config import Config
from rlhf.lm.sampling import SamplingConfig


class ShapingConfig(Config):
    """What is done to a completion's score before it becomes a reward; nothing by default."""

    score_clip: float | None = Field(None, gt=0)
    """Clip the reward function's score to [-score_clip, score_clip] (Ziegler et al. 2019)."""
    missing_end_score: float | None = None
    """Score of a completion cut at the limit, instead of its own: teaches the policy to stop (Huang et al. 2024)."""
    missing_end_penalty: float = Field(0.0, ge=0)
    """Or taken off its own score, as TRL's `missing_eos_penalty` was."""
    length_penalty: float = Field(0.0, ge=0)
    """Taken off the score per token of the completion, its end token included."""
    overlong_buffer: int | None = Field(None, ge=1)
    """Last so many tokens before the limit in which a penalty grows from 0 to -1 (DAPO, eq. 13)."""

    @model_validator(mode="after")
    def _refuse_two_answers_to_a_missing_end(self) -> Self:
        if self.missing_end_score is not None and self.missing_end_penalty:
            raise ValueError("missing_end_score replaces what missing_end_penalty would be taken off; set one of them")
        return self


class DynamicSampling(Config):
    """Groups of equal scores have no advantage; draw others in their place (DAPO, section 3.2)."""

    max_rounds: int = Field(4, ge=2)
    """Rounds of generation an iteration may take, the first included."""
    on_shortfall: Literal["fill", "error"] = "fill"
    """When rounds run out: keep uniform groups to fill the batch (with a warning and a metric), or stop the run."""


class CollectorConfig(Config):
    """How one iteration's rollout is collected."""

    prompts_per_iteration: int = Field(64, ge=1)
    """Over all processes."""
    group_size: int = Field(1, ge=1)
    """Completions per prompt."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature and lengths."""
    max_prompt_length: int | None = Field(None, ge=1)
    """Longer prompts are refused, never cut."""
    generation_prompts: int | None = Field(None, ge=1)
    """Prompts answered at once; bounds the cache's memory. None: all of this process."""
    measure_tokens: int = Field(16_384, ge=1)
    """Token budget of a microbatch of the no-grad forwards."""
    old_log_probs: Literal["auto", "recompute", "sampling"] = "auto"
    """recompute: by the trainer's own forward. sampling: the generator's, one forward fewer. auto: these too, as long
    as a forward every 20th iteration finds that the two agree within 1e-5 nats on average. Where they do not, and one
    step is made of a rollout, that step's own forward gives them and logs `sampling_mismatch_mean`. A critic on the
    policy's hidden states needs the forward anyhow: with one, auto is recompute."""
    keep_forward: bool = False
    """Let the forward over the rollout serve the first epoch too, which saves one of epochs + 1 of them: that of the
    critic where it has a body of its own, else the policy's where one is made. It takes the memory of the activations
    of the whole rollout; `rlhf explain` counts it. For one minibatch and one process."""
    shaping: ShapingConfig = ShapingConfig()
    dynamic_sampling: DynamicSampling | None = None
    mask_truncated: bool = False
    """Learn nothing from completions cut at the limit (DAPO's overlong filtering); they drop out of their group."""
    samples: int = Field(3, ge=0)
    """Readable records an iteration, for samples.jsonl."""

    @model_validator(mode="after")
    def _refuse_combinations_without_meaning(self) -> Self:
        if self.sampling.greedy:
            raise ValueError("a policy cannot learn from greedy completions; set sampling.greedy to false")
        if self.dynamic_sampling is not None and self.group_size < 2:
            raise ValueError(
                "dynamic_sampling compares the scores of a group; set group_size to 2 or more, or remove it"
            )
        if self.old_log_probs == "sampling" and not self.sampling.full_support:
            raise ValueError(
                "with top_p or top_k the generator's log-probs are renormalised; use old_log_probs: recompute"
            )
        buffer = self.shaping.overlong_buffer
        if buffer is not None and buffer >= self.sampling.max_completion_length:
            raise ValueError("shaping.overlong_buffer must be shorter than sampling.max_completion_length")
        return self
