"""Settings of the learner: what one update does with an experience."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config import Config


class UpdateConfig(Config):
    """How the weights move; what the loss is stands in `AlgorithmConfig`."""

    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls over the run, to 0 at its end."""
    warmup_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the run in which the learning rate rises linearly to its peak."""
    clip_schedule: Literal["constant", "linear"] = "constant"
    """Linear anneals the clip ranges to 0 over the run, as the PPO paper does on Atari."""
    optimizer: Literal["adamw", "adam", "rmsprop"] = "adamw"
    """adamw decouples weight_decay from the gradient, adam and rmsprop add it to it."""
    adam_epsilon: float = Field(1e-5, gt=0)
    """Added to the root of the second moment, by rmsprop too. 1e-5 is PPO's; torch's own default is 1e-8."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Smoothing of the first and the second moment."""
    rmsprop_alpha: float = Field(0.99, ge=0, lt=1)
    """Smoothing of rmsprop's second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled with adamw, an L2 term in the gradient otherwise."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """The gradient of all parameters together is scaled down to this Euclidean norm; null never clips."""
    target_kl: float | None = Field(None, gt=0)
    """An update stops before the step whose measured KL(old || policy) exceeds 1.5 times this, nats per action."""
    shuffle: Literal["rows", "actions"] = "rows"
    """What minibatches are drawn from: whole rows, or single actions (feed-forward gym policies)."""
    microbatch_rows: int | None = Field(None, ge=1)
    """Most rows in one forward and backward; null puts a minibatch through whole. Changes memory, not gradients."""
    microbatch_tokens: int | None = Field(None, ge=1)
    """Most tokens in one forward: rows x the longest of them."""
    flatten_parameters: bool = False
    """Keep parameters and gradients in one flat tensor each: one clip and one fused step, faster for small networks."""
