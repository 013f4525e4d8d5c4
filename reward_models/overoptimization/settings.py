"""What the lab trains: the start (a policy, and reward models of its answers), and what is optimized against them."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from reward_models.ensemble import Combine
from reward_models.settings import RewardModelConfig
from rlhf.config import Config
from rlhf.core.algorithm import AlgorithmConfig, FixedKl, NoKl
from rlhf.core.presets import AlgorithmChoice
from rlhf.lm.critic import CriticConfig
from rlhf.lm.loading import ModelConfig
from rlhf.lm.sampling import SamplingConfig
from rlhf.lm.sft_config import SftConfig
from rlhf.lm.sources import RewardConfig, SourceConfig
from rlhf.training.update_config import UpdateConfig


class BestOfNConfig(Config):
    """Best-of-n sampling from the start."""

    samples: int = Field(1024, ge=2)
    """Answers drawn to each held-out prompt; they estimate every n up to `largest` without bias."""
    largest: int = Field(512, ge=2)
    """n = 1, 2, 4, ... up to this."""

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if self.largest > self.samples:
            raise ValueError(f"the best of {self.largest} needs as many samples, and there are {self.samples}")
        return self

    @property
    def ns(self) -> list[int]:
        """The n."""
        return [2**power for power in range(self.largest.bit_length())]


class StartConfig(Config):
    """The policy that is optimized and the reward models that do not quite know what is good; once per seed."""

    model: ModelConfig
    source: SourceConfig
    """Prompts, and demonstrations where there is `sft`."""
    sft: SftConfig | None = None
    """Fine-tune the model on demonstrations first; null starts from it as it is."""
    gold: RewardConfig
    """The hidden scorer. It ranks the answers that reward models learn from, and judges; no policy is paid by it."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature and lengths, of all answers."""
    ranked_prompts: int = Field(200, ge=2)
    """Training prompts whose answers are ranked: the fewer, the worse the proxy."""
    num_candidates: int = Field(4, ge=2)
    """Answers ranked per prompt."""
    members: int = Field(4, ge=2)
    """Reward models, of different seeds; the first one is the proxy, all of them are the ensemble."""
    variance_coefficient: float = Field(0.1, ge=0)
    """Of the ensemble's variance in mean_minus_variance; the other combinations do not read it."""
    reward_model: RewardModelConfig = RewardModelConfig()
    best_of_n: BestOfNConfig = BestOfNConfig()


class Variant(Config):
    """One way of optimizing against the proxy."""

    kl_coefficient: float = Field(0.0, ge=0)
    """Of the KL to the start, in the algorithm's KL term."""
    combine: Combine | None = None
    """Take the ensemble, combined like this, as the reward; null takes the first reward model alone."""
    kl_budget: float | None = Field(None, gt=0)
    """End at the first rollout with more nats per answer than this."""

    @property
    def is_remedy(self) -> bool:
        """Whether it is more than a KL coefficient."""
        return self.combine is not None or self.kl_budget is not None


class OptimizationConfig(Config):
    """How every variant is optimized, and how often it is looked at."""

    algorithm: AlgorithmChoice = Field("ppo_rlhf", validate_default=True)
    critic: CriticConfig = CriticConfig()
    update: UpdateConfig = UpdateConfig(learning_rate=1e-4)
    prompts_per_iteration: int = Field(128, ge=1)
    """Prompts of a rollout."""
    group_size: int = Field(2, ge=1)
    """Answers to each of them."""
    iterations: int = Field(60, ge=1)
    """Rollouts; each is followed by one update."""
    evaluate_every: int = Field(3, ge=1)
    """Iterations between measurements of gold, proxy and KL on held-out prompts, the first before iteration 1."""
    samples_per_prompt: int = Field(8, ge=1)
    """Answers drawn to each held-out prompt at a measurement."""

    @model_validator(mode="after")
    def _has_a_kl_term(self) -> Self:
        if isinstance(self.algorithm.kl, NoKl):
            raise ValueError("variants set the coefficient of a KL term, and this algorithm has none; give it kl")
        return self

    def with_coefficient(self, value: float) -> AlgorithmConfig:
        """The algorithm with this KL coefficient."""
        kl = self.algorithm.kl.model_copy(update={"coefficient": FixedKl(value=value)})
        return self.algorithm.model_copy(update={"kl": kl})
