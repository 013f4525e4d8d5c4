"""Ensembles: the three combinations by hand, folders, what is logged, what is refused."""

import pytest
import torch

from reward_models.ensemble import EnsembleScorer, combine_scores
from reward_models.loading import make_reward_model
from reward_models.scorer import RewardModelScorer
from rlhf.errors import RewardError
from rlhf.lm.loading import ModelConfig
from rlhf.rewards.loading import load_reward
from rlhf.rewards.protocol import RewardLog, score_completions

SCORES = [[1.0, 4.0, -2.0], [3.0, 4.0, 0.0], [5.0, 1.0, -1.0]]
PROMPTS, COMPLETIONS = ["ab>", "x>", "z>"], ["cd", "q", "efg"]


def fixed(values):
    return lambda completions, **columns: values


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("mean", [3, 3, -1]),
        ("worst_case", [1, 1, -2]),
        # Population variances: (4 + 0 + 4)/3, (1 + 1 + 4)/3, (1 + 1 + 0)/3.
        ("mean_minus_variance", [3 - 0.5 * 8 / 3, 3 - 0.5 * 2, -1 - 0.5 * 2 / 3]),
    ],
)
def test_combinations_by_hand(combine, expected):
    combined = combine_scores(torch.tensor(SCORES), combine=combine, coefficient=0.5)
    assert combined.tolist() == pytest.approx(expected, abs=1e-6)
    ensemble = EnsembleScorer([fixed(row) for row in SCORES], combine=combine, coefficient=0.5)
    assert ensemble(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)


def test_members_and_disagreement_are_logged():
    log = RewardLog()
    ensemble = EnsembleScorer([fixed(row) for row in SCORES[:2]])
    score_completions(ensemble, prompts=PROMPTS, completions=COMPLETIONS, log=log)
    # Standard deviations of pairs (1, 3), (4, 4), (-2, 0): 1, 0, 1.
    assert {name: values[0] for name, values in log.metrics.items()} == pytest.approx(
        {"ensemble_member_0": 1.0, "ensemble_member_1": 7 / 3, "ensemble_disagreement": 2 / 3}
    )


def test_folders_by_pattern_as_a_config_names_them(tmp_path, tokenizer, reward_model):
    alone = []
    for seed in (0, 1):
        model = make_reward_model(ModelConfig(config=reward_model.config.to_dict()), tokenizer, seed=seed)
        scorer = RewardModelScorer(model, tokenizer, mean=float(seed), std=2.0)
        scorer.save_pretrained(tmp_path / f"seed_{seed}/reward_model")
        alone.append(torch.tensor(scorer(PROMPTS, COMPLETIONS)))
    ensemble = load_reward(
        "reward_models:EnsembleScorer.from_pretrained",
        arguments={"folders": f"{tmp_path}/seed_*/reward_model", "combine": "worst_case"},
    )
    assert ensemble(PROMPTS, COMPLETIONS) == pytest.approx(torch.minimum(*alone).tolist(), abs=1e-6)
    with pytest.raises(RewardError, match="1 folders"):
        EnsembleScorer.from_pretrained(f"{tmp_path}/seed_0/*")


@pytest.mark.parametrize(
    ("members", "settings", "reason"),
    [
        (1, {}, "two members or more"),
        (2, {"coefficient": -1.0}, "rewards disagreement"),
        (2, {"combine": "median"}, "unknown way to combine"),
    ],
)
def test_refusals(members, settings, reason):
    with pytest.raises(RewardError, match=reason):
        EnsembleScorer([fixed([0.0])] * members, **settings)


def test_a_member_that_fails_is_named():
    with pytest.raises(RewardError, match="ensemble_member_1: wrong number of scores"):
        EnsembleScorer([fixed([1, 2, 3]), fixed([1])])(PROMPTS, COMPLETIONS)
