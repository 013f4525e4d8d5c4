"""TRL 1.16's GRPO loss, by calling `GRPOTrainer._compute_loss` itself, against ours.

| TRL loss_type | our row | agreement |
|---|---|---|
| grpo | clipped, sequence_mean | equal |
| bnpo | clipped, token_mean | equal |
| dr_grpo | clipped, fixed_length | equal |
| dapo | clipped, token_mean | equal where num_items_in_batch counts the step's tokens |
| grpo at level sequence (GSPO) | sequence_geometric_mean, sequence_mean | equal |
| luspo (level sequence) | sequence_geometric_mean, sequence_sum | equal |
| cispo | clipped_weight, token_mean | equal where epsilon_high = 1 + clip_high; TRL's default differs |
| sapo | no axis of ours; a surrogate of the user's own | equal |
| vespo | no axis of ours; a surrogate of the user's own | equal |
| delta (two-sided clipping) | dual_clipped, bound = delta | equal |
| use_bias_correction_kl | k3_weighted | equal |
| entropy_coef | entropy_coef | equal for token_mean; TRL's bonus is a token mean under every loss_type |
| top_entropy_quantile, off_policy_mask_threshold | none | no equivalent |
"""

from __future__ import annotations

import inspect
import math
import re
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.core.algorithm import (
    AlgorithmConfig,
    Clipped,
    ClippedWeight,
    DualClipped,
    FixedLength,
    GroupRelative,
    KlInLoss,
    NoKl,
    SequenceMean,
    SequenceSum,
    TokenMean,
)
from rlhf.core.objective import Objective
from rlhf.core.types import Experience, PolicyOutput

trl_trainer = pytest.importorskip("trl.trainer.grpo_trainer")

MAX_LENGTH = 12
LOW, HIGH = 0.2, 0.28


def trl_loss(batch, log_probs: Tensor, *, extra: dict[str, Tensor] | None = None, **settings: Any) -> Tensor:
    """TRL's loss as its trainer computes it, on a stand-in that answers with the given log-probs."""
    options: dict[str, Any] = {
        "loss_type": "grpo",
        "level": "token",
        "beta": 0.0,
        "epsilon_low": LOW,
        "epsilon_high": HIGH,
        "delta": None,
        "use_bias_correction_kl": False,
        "entropy_coef": 0.0,
        "num_items": int(batch.mask.sum()),
    }
    options.update(settings)
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    trainer = SimpleNamespace(
        loss_type=options["loss_type"],
        importance_sampling_level=options["level"],
        beta=options["beta"],
        epsilon_low=options["epsilon_low"],
        epsilon_high=options["epsilon_high"],
        args=SimpleNamespace(
            delta=options["delta"],
            use_bias_correction_kl=options["use_bias_correction_kl"],
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        ),
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=extra is not None and "importance_sampling_ratio" in extra,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=options["entropy_coef"],
        _entropy_bonus_enabled=options["entropy_coef"] != 0.0,
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        _metrics=defaultdict(lambda: defaultdict(list)),
        get_gamma_weights=trl_trainer.GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (log_probs, batch.entropy, None),
    )
    rows, steps = batch.mask.shape
    inputs = {
        "prompt_ids": torch.zeros(rows, 2, dtype=torch.int64),
        "prompt_mask": torch.ones(rows, 2, dtype=torch.int64),
        "completion_ids": torch.zeros(rows, steps, dtype=torch.int64),
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_log_probs,
        "ref_per_token_logps": batch.ref_log_probs,
        "num_items_in_batch": torch.tensor(options["num_items"]),
        **(extra or {}),
    }
    return trl_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)


def our_loss(batch, log_probs: Tensor, algorithm: AlgorithmConfig, *, kl_coef=0.0, weights=None, surrogate=None):
    experience = Experience(
        inputs={},
        actions=torch.zeros_like(batch.mask, dtype=torch.int64),
        action_mask=batch.mask,
        old_log_probs=batch.old_log_probs,
        advantages=torch.where(batch.mask, batch.advantages.unsqueeze(1), 0.0),
        ref_log_probs=batch.ref_log_probs,
        weights=weights,
    )
    objective = Objective(algorithm, surrogate=surrogate)
    sums = objective(PolicyOutput(log_probs, batch.entropy, None), experience, kl_coef=kl_coef)
    return objective.loss(sums, objective.denominators(batch.mask))


def assert_equal(batch, settings: dict[str, Any], algorithm: AlgorithmConfig, *, extra=None, **ours: Any) -> None:
    """Loss and gradient of both, to 1e-5 as promised (they agree to 1e-9 in float64)."""
    theirs, mine = (batch.log_probs.clone().requires_grad_() for _ in range(2))
    trl_value, our_value = (
        trl_loss(batch, theirs, extra=extra, **settings),
        our_loss(batch, mine, algorithm, **ours),
    )
    trl_value.backward()
    our_value.backward()
    assert our_value.item() == pytest.approx(trl_value.item(), rel=1e-9)
    assert torch.allclose(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert mine.grad.abs().max() > 0


def row(**settings: Any) -> AlgorithmConfig:
    settings = {"surrogate": Clipped(clip_low=LOW, clip_high=HIGH), **settings}
    return AlgorithmConfig(advantages=GroupRelative(), **settings)


K3 = KlInLoss(estimator="k3", against="reference")


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({"loss_type": "grpo"}, {"aggregation": SequenceMean()}),
        ({"loss_type": "bnpo"}, {"aggregation": TokenMean()}),
        ({"loss_type": "dr_grpo"}, {"aggregation": FixedLength(length=MAX_LENGTH)}),
        ({"loss_type": "dapo"}, {"aggregation": TokenMean()}),
        (
            {"loss_type": "grpo", "level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
            {
                "aggregation": SequenceMean(),
                "ratio": "sequence_geometric_mean",
                "surrogate": Clipped(clip_low=3e-4, clip_high=4e-4),
            },
        ),
        (
            {"loss_type": "luspo", "level": "sequence"},
            {"aggregation": SequenceSum(), "ratio": "sequence_geometric_mean"},
        ),
        (
            {"loss_type": "cispo", "epsilon_high": 1.3},
            {"aggregation": TokenMean(), "surrogate": ClippedWeight(clip_high=0.3)},
        ),
        (
            {"loss_type": "grpo", "delta": 1.5},
            {
                "aggregation": SequenceMean(),
                "surrogate": DualClipped(clip_low=LOW, clip_high=HIGH, bound=1.5),
            },
        ),
    ],
    ids=["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo", "cispo", "grpo-delta"],
)
def test_loss_and_gradient_are_equal(settings, ours, beta, completions):
    kl = K3 if beta else NoKl()
    assert_equal(completions, {**settings, "beta": beta}, row(kl=kl, **ours), kl_coef=beta)


def test_bias_corrected_kl_is_k3_weighted(completions):
    algorithm = row(kl=KlInLoss(estimator="k3_weighted"), aggregation=TokenMean())
    settings = {"loss_type": "bnpo", "beta": 0.1, "use_bias_correction_kl": True}
    assert_equal(completions, settings, algorithm, kl_coef=0.1)


def test_engine_weights(completions):
    weights = torch.rand(completions.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    algorithm = row(kl=K3, aggregation=SequenceMean())
    extra = {"importance_sampling_ratio": weights}
    assert_equal(
        completions, {"loss_type": "grpo", "beta": 0.04}, algorithm, extra=extra, kl_coef=0.04, weights=weights
    )


def test_the_fused_presets_share_trl_s_defaults(completions):
    """Our preset `grpo` is TRL's loss_type grpo with beta .04 and epsilon .2."""
    from rlhf.core.presets import ALGORITHMS

    settings = {"loss_type": "grpo", "beta": 0.04, "epsilon_high": 0.2}
    assert_equal(completions, settings, ALGORITHMS["grpo"], kl_coef=0.04)


# --- where there is no axis of ours ----------------------------------------------------------------------------------


def test_sapo_as_a_surrogate_of_the_users_own(completions):
    """SAPO's soft gate, arXiv 2511.20347: 4 / tau sigmoid(tau (rho - 1)), tau 1 for A > 0 and 1.05 otherwise."""

    def soft_gate(ratio, log_probs, advantages):
        temperature = torch.where(advantages > 0, 1.0, 1.05)
        return torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages

    assert_equal(completions, {"loss_type": "sapo"}, row(aggregation=SequenceMean()), surrogate=soft_gate)


def test_vespo_as_a_surrogate_of_the_users_own(completions):
    """VESPO weighs log pi by a constant function of the exact row weight w: e^lambda w^k e^(-lambda w)."""

    def gamma_weighted(ratio, log_probs, advantages):
        k, rate = torch.where(advantages >= 0, 2.0, 3.0), torch.where(advantages >= 0, 3.0, 2.0)
        w = ratio.detach()
        return w**k * torch.exp(rate - rate * w) * advantages * log_probs

    # The config's own surrogate is not used; clipped_weight is the one that, like VESPO, detaches the ratio.
    algorithm = row(ratio="sequence_product", surrogate=ClippedWeight(), aggregation=TokenMean())
    assert_equal(completions, {"loss_type": "vespo"}, algorithm, surrogate=gamma_weighted)


# --- where the definitions differ -------------------------------------------------------------------------------------


def test_trl_s_cispo_caps_at_epsilon_high_itself_and_falls_back_to_epsilon(completions):
    """TRL: min(rho, epsilon_high). Ours: min(rho, 1 + clip_high), MiniMax eq. 5.

    TRL's epsilon_high defaults to epsilon = .2, so that every weight is at most .2: on data at ratio 1 its gradient is
    a fifth of the policy gradient's, where the paper's is the whole of it.
    """
    at_one = replace(completions, log_probs=completions.old_log_probs)
    gradients = {}
    for name in ("trl", "ours"):
        log_probs = at_one.log_probs.clone().requires_grad_()
        if name == "trl":
            loss = trl_loss(at_one, log_probs, loss_type="cispo", epsilon_high=0.2)
        else:
            loss = our_loss(at_one, log_probs, row(surrogate=ClippedWeight(clip_high=0.2)))
        loss.backward()
        gradients[name] = log_probs.grad
    plain = torch.where(at_one.mask, -at_one.advantages.unsqueeze(1) / at_one.mask.sum(), 0.0)
    assert torch.allclose(gradients["ours"], plain)
    assert torch.allclose(gradients["trl"], 0.2 * plain)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_trl_divides_by_num_items_in_batch_ours_by_the_steps_tokens(loss_type, completions):
    """TRL's num_items_in_batch spans the generation batch, rescaled by its number of optimizer steps, however many
    tokens this step's rows really have. Twice the tokens there halve TRL's loss; ours sees this step's 31 only.
    """
    assert int(completions.mask.sum()) == 31
    here = trl_loss(completions, completions.log_probs, loss_type=loss_type, epsilon_high=1.3, num_items=31)
    elsewhere = trl_loss(completions, completions.log_probs, loss_type=loss_type, epsilon_high=1.3, num_items=62)
    assert elsewhere.item() == pytest.approx(here.item() / 2)


def test_trl_s_bnpo_and_grpo_divide_each_microbatch_by_its_own_counts(completions):
    """Gradient accumulation over two microbatches of 14 and 17 tokens: TRL averages two token means, ours is the mean
    over all 31, the same as without accumulation."""
    whole = our_loss(completions, completions.log_probs, row(aggregation=TokenMean())).item()
    halves = []
    for part in (slice(0, 3), slice(3, 6)):
        cut = type(completions)(**{name: value[part] for name, value in vars(completions).items()})
        halves.append((trl_loss(cut, cut.log_probs, loss_type="bnpo").item(), int(cut.mask.sum())))
    assert [count for _, count in halves] == [14, 17]
    by_tokens = sum(loss * count for loss, count in halves) / 31
    assert whole == pytest.approx(by_tokens)
    assert abs(sum(loss for loss, _ in halves) / 2 - whole) > 1e-3


def test_the_entropy_bonus_is_equal_for_token_mean_only(completions):
    bonus = {"entropy_coef": 0.1}
    assert_equal(completions, {"loss_type": "bnpo", **bonus}, row(aggregation=TokenMean(), **bonus))
    # TRL's bonus is the mean over tokens under every loss_type; ours is aggregated as the surrogate is.
    mask, entropy = completions.mask, completions.entropy
    token_mean = (entropy * mask).sum() / mask.sum()
    sequence_mean = ((entropy * mask).sum(1) / mask.sum(1)).mean()
    theirs = trl_loss(completions, completions.log_probs, loss_type="grpo", **bonus)
    ours = our_loss(completions, completions.log_probs, row(aggregation=SequenceMean(), **bonus))
    assert (theirs - ours).item() == pytest.approx(0.1 * (sequence_mean - token_mean).item())


def test_ratios_beyond_e_to_the_20_are_clamped_by_ours_only(completions):
    """TRL's exp overflows float32 at a log-ratio of 89; ours is clamped at 20. (A < 0 leaves both unclipped.)"""
    log_probs = completions.old_log_probs.float() + 100.0
    single = replace(
        completions,
        old_log_probs=completions.old_log_probs.float(),
        ref_log_probs=completions.ref_log_probs.float(),
        entropy=completions.entropy.float(),
        advantages=-torch.ones(6),
    )
    assert not math.isfinite(trl_loss(single, log_probs, loss_type="bnpo").item())
    assert our_loss(single, log_probs, row()).item() == pytest.approx(math.exp(20), rel=1e-5)


def test_every_loss_type_of_trl_is_accounted_for():
    """A new loss_type in TRL should be noticed here."""
    source = inspect.getsource(trl_trainer.GRPOTrainer._compute_loss)
    compared = re.findall(r"self\.loss_type (?:==|in) (\[[^\]]*\]|\"\w+\")", source)
    named = set(re.findall(r"\w+", " ".join(compared)))
    assert named == {"grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"}
