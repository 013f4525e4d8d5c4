"""The named algorithms, as one table of data.

Every row runs on a language model, and on CartPole unless it needs what only language models have:
`AlgorithmConfig.language_only` says what that is.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from rlhf.config import merge_settings
from rlhf.core.algorithm import (
    AdaptiveKl,
    AlgorithmConfig,
    BestOfGroup,
    Clipped,
    ClippedValueLoss,
    ClippedWeight,
    FixedKl,
    FixedLength,
    Gae,
    GeometricMean,
    GreedyBaseline,
    GroupRelative,
    GroupRelativeParts,
    KlInLoss,
    KlInReward,
    LeaveOneOut,
    PolicyGradient,
    ProbabilityMask,
    RewardsToGo,
    SequenceMean,
    SequenceSum,
    SoftGate,
    SquaredValueLoss,
    TokenMean,
    TruncatedWeights,
    Unclipped,
)

ALGORITHMS: dict[str, AlgorithmConfig] = {
    # Williams 1992, with rewards to go.
    "reinforce": AlgorithmConfig(
        advantages=RewardsToGo(discount=0.99), surrogate=PolicyGradient(), aggregation=TokenMean()
    ),
    # Mnih et al. 2016, https://arxiv.org/abs/1602.01783, synchronous; lambda 1 as in Stable-Baselines3.
    "a2c": AlgorithmConfig(
        advantages=Gae(discount=0.99, gae_lambda=1.0), surrogate=PolicyGradient(), value_loss=SquaredValueLoss()
    ),
    # Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7.
    "ppo": AlgorithmConfig(
        advantages=Gae(discount=0.99, gae_lambda=0.95, standardize="minibatch"),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        value_loss=ClippedValueLoss(coefficient=0.5, clip_range=0.2),
        epochs=4,
        minibatches=4,
    ),
    # The same paper, eq. 8 and section 4: a KL penalty against the old policy instead of clipping.
    "ppo_kl": AlgorithmConfig(
        advantages=Gae(discount=0.99, gae_lambda=0.95, standardize="minibatch"),
        surrogate=Unclipped(),
        kl=KlInLoss(estimator="k3", against="old_policy", coefficient=AdaptiveKl(initial=1.0, target=0.01)),
        value_loss=SquaredValueLoss(),
        epochs=4,
        minibatches=4,
    ),
    # Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; Huang et al. 2024, https://arxiv.org/abs/2403.17031.
    "ppo_rlhf": AlgorithmConfig(
        advantages=Gae(discount=1.0, gae_lambda=0.95, standardize="batch"),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        kl=KlInReward(estimator="k1", coefficient=FixedKl(value=0.05)),
        value_loss=ClippedValueLoss(coefficient=0.1, clip_range=0.2),
        epochs=4,
    ),
    # Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740.
    "rloo": AlgorithmConfig(
        advantages=LeaveOneOut(),
        surrogate=PolicyGradient(),
        kl=KlInReward(estimator="k1", coefficient=FixedKl(value=0.05)),
        aggregation=SequenceSum(),
    ),
    # Hu 2025, https://arxiv.org/abs/2501.03262.
    "reinforce++": AlgorithmConfig(
        advantages=RewardsToGo(discount=1.0, standardize="batch"),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        kl=KlInReward(estimator="k1", coefficient=FixedKl(value=0.01)),
    ),
    # Shao et al. 2024, https://arxiv.org/abs/2402.03300, eq. 3 and 4.
    "grpo": AlgorithmConfig(
        advantages=GroupRelative(scale="sample_std", epsilon=1e-4),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        kl=KlInLoss(estimator="k3", against="reference", coefficient=FixedKl(value=0.04)),
        aggregation=SequenceMean(),
    ),
    # Liu et al. 2025, https://arxiv.org/abs/2503.20783.
    "dr_grpo": AlgorithmConfig(
        advantages=GroupRelative(scale="none"),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        aggregation=FixedLength(),
    ),
    # Yu et al. 2025, https://arxiv.org/abs/2503.14476; dynamic sampling is the prompt collector's.
    "dapo": AlgorithmConfig(
        advantages=GroupRelative(scale="sample_std", epsilon=1e-4),
        surrogate=Clipped(clip_low=0.2, clip_high=0.28),
        minibatches=16,
    ),
    # Zheng et al. 2025, https://arxiv.org/abs/2507.18071.
    "gspo": AlgorithmConfig(
        advantages=GroupRelative(scale="sample_std", epsilon=1e-4),
        ratio="sequence_geometric_mean",
        surrogate=Clipped(clip_low=3e-4, clip_high=4e-4),
        aggregation=SequenceMean(),
        minibatches=4,
    ),
    # MiniMax 2025, https://arxiv.org/abs/2506.13585; the cap of 5 is ScaleRL's, https://arxiv.org/abs/2510.13786.
    "cispo": AlgorithmConfig(
        advantages=GroupRelative(scale="sample_std", epsilon=1e-4),
        surrogate=ClippedWeight(clip_high=4.0),
    ),
    # Zheng et al. 2025 (the paper of gspo), its token form: the row's ratio, each action's own gradient.
    "gspo_token": AlgorithmConfig(
        advantages=GroupRelative(scale="sample_std", epsilon=1e-4),
        ratio="sequence_geometric_mean_token",
        surrogate=Clipped(clip_low=3e-4, clip_high=4e-4),
        aggregation=SequenceMean(),
        minibatches=4,
    ),
    # Zhao et al. 2025, https://arxiv.org/abs/2507.20673.
    "gmpo": AlgorithmConfig(
        advantages=GroupRelative(scale="sample_std", epsilon=1e-4),
        surrogate=GeometricMean(clip_low=0.4, clip_high=0.4),
        aggregation=SequenceMean(),
        minibatches=4,
    ),
    # https://arxiv.org/abs/2602.04879; the limit is prime-rl's.
    "dppo": AlgorithmConfig(
        advantages=GroupRelative(scale="sample_std", epsilon=1e-4),
        surrogate=ProbabilityMask(limit=0.2),
        minibatches=4,
    ),
    # Gao et al. 2025, https://arxiv.org/abs/2511.20347.
    "sapo": AlgorithmConfig(
        advantages=GroupRelative(scale="sample_std", epsilon=1e-4),
        surrogate=SoftGate(temperature_positive=1.0, temperature_negative=1.05),
        aggregation=SequenceMean(),
        minibatches=4,
    ),
    # Hao et al. 2025, https://arxiv.org/abs/2505.23585: exactly on-policy, hence one step and no clipping.
    "opo": AlgorithmConfig(
        advantages=GroupRelative(baseline="length_weighted", scale="none"),
        surrogate=PolicyGradient(),
        aggregation=SequenceSum(),
    ),
    # Tajwar et al. 2026, https://arxiv.org/abs/2602.02710; for scores that are not negative.
    "maxrl": AlgorithmConfig(
        advantages=GroupRelative(scale="mean", epsilon=1e-6),
        surrogate=PolicyGradient(),
        aggregation=SequenceSum(),
    ),
    # Liu et al. 2025, https://arxiv.org/abs/2508.08221.
    "lite_ppo": AlgorithmConfig(
        advantages=GroupRelative(scale="batch_std", epsilon=1e-4),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
    ),
    # Tang et al. 2025, https://arxiv.org/abs/2503.19595; surrogate as in grpo.
    "grpo_pass_at_k": AlgorithmConfig(
        advantages=BestOfGroup(), surrogate=Clipped(clip_low=0.2, clip_high=0.2), aggregation=SequenceMean()
    ),
    # Hu 2025 (the paper of reinforce++), with a group's mean as baseline and the KL in the loss, by k2.
    "reinforce++_baseline": AlgorithmConfig(
        advantages=GroupRelative(scale="none", standardize="batch"),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        kl=KlInLoss(estimator="k2", against="reference", coefficient=FixedKl(value=0.01)),
    ),
    # Yue et al. 2025, https://arxiv.org/abs/2504.05118, without its likelihood of correct samples:
    # imitation: {coefficient: 0.1} adds it.
    "vapo": AlgorithmConfig(
        advantages=Gae(discount=1.0, length_adaptive=0.05, critic_lambda=1.0, standardize="batch"),
        surrogate=Clipped(clip_low=0.2, clip_high=0.28),
        value_loss=ClippedValueLoss(coefficient=0.5, clip_range=0.5),
        minibatches=16,
    ),
    # Li et al. 2023, https://arxiv.org/abs/2310.10505; language models only.
    "remax": AlgorithmConfig(
        advantages=GreedyBaseline(),
        surrogate=PolicyGradient(),
        kl=KlInReward(estimator="k1", coefficient=FixedKl(value=0.05)),
        aggregation=SequenceSum(),
    ),
    # https://arxiv.org/abs/2601.05242; language models with several rewards only.
    "gdpo": AlgorithmConfig(
        advantages=GroupRelativeParts(),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        aggregation=SequenceMean(),
    ),
    # Hilton et al. 2021, https://arxiv.org/abs/2110.00641; AReaL, https://arxiv.org/abs/2505.24298: clipped around the
    # trainer's old policy, weighted by its ratio to the engine that wrote the tokens; language models only.
    "decoupled_ppo": AlgorithmConfig(
        advantages=Gae(discount=1.0, gae_lambda=1.0, standardize="batch"),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        value_loss=ClippedValueLoss(coefficient=0.5, clip_range=0.2),
        rollout_correction=TruncatedWeights(cap=5.0),
        minibatches=4,
    ),
}


def resolve_algorithm(value: Any) -> Any:
    """Turn a preset's name, or a mapping with `preset`, into the settings it stands for.

    Args:
        value: `"grpo"`; `{"preset": "grpo", "epochs": 2, "surrogate": {"clip_high": 0.28}}`, whose other keys
            replace the preset's (nested keys one by one, unless `type` changes); or full settings.

    Returns:
        What `AlgorithmConfig` validates.

    Raises:
        ValueError: No preset has that name.
    """
    if isinstance(value, str):
        return _preset(value)
    if isinstance(value, Mapping) and "preset" in value:
        changes = {key: change for key, change in value.items() if key != "preset"}
        return merge_settings(_preset(str(value["preset"])).model_dump(), changes)
    return value


def _preset(name: str) -> AlgorithmConfig:
    if name not in ALGORITHMS:
        nearest = difflib.get_close_matches(name, ALGORITHMS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"no algorithm named {name!r}; {hint}there are: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


AlgorithmChoice = Annotated[AlgorithmConfig, BeforeValidator(resolve_algorithm)]
"""Field type for configs: a preset's name, a preset with changes, or full settings."""
