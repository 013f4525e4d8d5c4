"""RewardBench's weighting, best of four and Ties, by hand; the recipe on small files of the same columns."""

import json
import math
from pathlib import Path

import pytest
import torch

from reward_models.evaluation import reliability
from reward_models.judging import draw_reliability, judge, score_with
from reward_models.reward_bench import (
    SECTIONS,
    SubsetResult,
    benchmark_table,
    rank_table,
    row_credits,
    section_scores,
    subset_results,
    ties_score,
)
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config, validate
from rlhf.data.records import Ranking
from rlhf.errors import ConfigError, DataError

RECIPE = find_recipe("reward_bench")
SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"


def row(ranks, **columns):
    completions = tuple("abcdefgh"[: len(ranks)])
    return Ranking("p", completions, tuple(ranks), columns=columns)


def credits(scores, ranks, *, best_of):
    rows = [row(one) for one in ranks]
    table, mask = rank_table(rows)
    return row_credits(torch.tensor(scores), table, mask=mask, best_of=best_of).tolist()


def test_a_pair_counts_only_if_strictly_won():
    assert credits([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]], [[0, 1]] * 3, best_of=False) == [1, 0, 0]


def test_best_of_four_shares_ties_at_the_top():
    scores = [[4.0, 1, 2, 3], [1.0, 4, 2, 3], [4.0, 4, 2, 3], [3.0, 3, 3, 3]]
    assert credits(scores, [[0, 1, 1, 1]] * 4, best_of=True) == [1, 0, 0.5, 0.25]
    # The absent third candidate of the first row has score 9 in the table and must not win.
    assert credits([[2.0, 1.0, 9.0], [1.0, 2.0, 0.0]], [[0, 1], [0, 1, 1]], best_of=True) == [1, 0]


def test_sections_of_the_whole_benchmark():
    """Rows of each subset as the data set's card lists them; math-prm's 447 count as 984, the code's rows."""
    rows = {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28}
    rows |= {"mt-bench-med": 40, "math-prm": 447}
    rows |= {name: 164 for name in SECTIONS["Reasoning"] if name != "math-prm"}
    scores = {"alpacaeval-easy": 0.9, "mt-bench-easy": 0.5, "math-prm": 0.6, "hep-go": 0.3}
    results = [SubsetResult(name, count, scores.get(name, 0.8), 0, 1) for name, count in rows.items()]
    sections = section_scores(results)
    assert sections["Chat"] == pytest.approx((100 * 0.9 + 95 * 0.8 * 2 + 28 * 0.5 + 40 * 0.8) / 358)
    assert sections["Reasoning"] == pytest.approx((984 * 0.6 + 164 * 0.3 + 5 * 164 * 0.8) / (2 * 984))
    assert set(sections) == {"Chat", "Reasoning"}


def test_table_of_version_1_is_the_mean_of_its_sections():
    rankings = [row([0, 1], subset=name) for name in ("mt-bench-easy", "mt-bench-easy", "donotanswer", "hep-go")]
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    results, above = benchmark_table(scores, rankings, layout="reward_bench")
    assert [(one.name, one.rows, one.score) for one in results] == [
        ("mt-bench-easy", 2, 0.5),
        ("donotanswer", 1, 1.0),
        ("hep-go", 1, 1.0),
    ]
    assert above == pytest.approx({"Chat": 0.5, "Safety": 1.0, "Reasoning": 1.0, "score": 2.5 / 3})
    with pytest.raises(DataError, match="'elsewhere' is no subset of RewardBench"):
        benchmark_table(scores[:1], [row([0, 1], subset="elsewhere")], layout="reward_bench")
    with pytest.raises(DataError, match="needs its subset's name"):
        benchmark_table(scores[:1], [row([0, 1])], layout="subsets")


def test_ties_by_hand():
    # tied:1 right 3, 2, wrong 0: gap 2, spread 1. ref:1 right 1, wrong 0: gap 1. least = 1: not above the spread.
    # tied:2 right 3, 1, wrong 2: gap -1, spread 2. ref:2 gap 3. least = -1.
    scores = torch.tensor([[3.0, 2, 0], [1.0, 0, 0], [3.0, 1, 2], [3.0, 0, 0]])
    rankings = [row([0, 0, 1]), row([0, 1]), row([0, 0, 1]), row([0, 1])]
    ranks, mask = rank_table(rankings)
    expected = 0.3 * 0.5 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0 + 0.01 * (math.tanh(1 / 1 - 1) + math.tanh(-1 / 2 - 1)) / 2
    score = ties_score(scores, ranks, mask=mask, ids=["tied:1", "ref:1", "tied:2", "ref:2"])
    assert score == pytest.approx(expected)
    with pytest.raises(DataError, match="lacks its partner"):
        ties_score(scores, ranks, mask=mask, ids=["tied:1", "ref:1", "tied:2", "ref:3"])
    with pytest.raises(DataError, match="not of the subset Ties"):
        ties_score(scores, ranks, mask=mask, ids=["1", "2", "3", "4"])


def test_intervals_are_bootstrapped_over_rows():
    # 400 rows, 70 % won: 1.96 standard errors are 0.0449.
    (result,) = subset_results(torch.tensor([1.0] * 280 + [0.0] * 120, dtype=torch.float64), ["a"] * 400)
    assert (result.rows, result.score) == (400, pytest.approx(0.7))
    assert result.low == pytest.approx(0.7 - 0.0449, abs=0.006)
    assert result.high == pytest.approx(0.7 + 0.0449, abs=0.006)


def test_reliability_by_hand_and_its_plot(tmp_path):
    # Gaps log 4 (confidence 0.8, right), log 4 (wrong), log 1.5 (confidence 0.6, right); five bins of width 0.1:
    # 0.6 lies in the second (0.6 to 0.7), 0.8 in the fourth.
    # A hair above the edges, so that rounding cannot put them into the bin below.
    four, more = math.log(4) + 1e-4, math.log(1.5) + 1e-4
    scores = torch.tensor([[four, 0.0], [0.0, four], [more, 0.0]])
    binned = reliability(scores, torch.tensor([[0, 1]] * 3), mask=torch.ones(3, 2, dtype=torch.bool), bins=5)
    assert binned.pairs.tolist() == [0, 1, 0, 2, 0]
    assert binned.confidence.tolist() == pytest.approx([0, 0.6, 0, 0.8, 0], abs=1e-4)
    assert binned.accuracy.tolist() == [0, 1, 0, 0.5, 0]
    assert binned.error() == pytest.approx((0.4 * 1 + 0.3 * 2) / 3, abs=1e-4)
    draw_reliability(binned, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_any_reward_is_asked_with_the_columns():
    def reward(prompts, completions, bonus, **columns):
        return [len(text) + extra for text, extra in zip(completions, bonus, strict=True)]

    rankings = [
        Ranking("p", ("aaa", "b"), (0, 1), columns={"bonus": 10}),
        Ranking("q", ("a", "bb", "ccc"), (2, 1, 0), columns={"bonus": 20}),
    ]
    scores = score_with(reward, rankings, completions_per_call=2)
    assert scores.tolist() == [[13, 11, 0], [21, 22, 23]]
    metrics, _ = judge(scores, rankings)
    assert metrics["accuracy"] == metrics["length_accuracy"] == metrics["kendall_tau"] == 1.0
    assert metrics["length_correlation"] == pytest.approx(1.0)


# --- the recipe ---------------------------------------------------------------------------------------------------


def prefers_long(completions, **columns):
    return [float(len(text[-1]["content"]) if isinstance(text, list) else len(text)) for text in completions]


def run(config, folder, *overrides):
    module = import_recipe(RECIPE)
    reward = ["reward.function=" + f"{__file__}:prefers_long", "reward.arguments={}"]
    return module.main(
        load_config(module.CONFIG, RECIPE.configs[config], [*reward, *overrides, f"run.directory={folder}"])
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={path}"


@pytest.mark.parametrize("name", sorted(RECIPE.configs))
def test_every_config_loads_and_survives_being_written(name):
    config = load_config(import_recipe(RECIPE).CONFIG, RECIPE.configs[name])
    assert type(config).model_validate(config.model_dump(mode="json")) == config


def test_version_1_file(tmp_path):
    pairs = [("alpacaeval-easy", "longer", "short"), ("llmbar-natural", "no", "longer"), ("hep-go", "yes", "no")]
    rows = [
        {"id": i, "prompt": "hi", "chosen": c, "chosen_model": "x", "rejected": r, "rejected_model": "y", "subset": s}
        for i, (s, c, r) in enumerate(pairs)
    ]
    metrics = run("reward_bench", tmp_path / "run", write(tmp_path / "v1.jsonl", rows))
    assert metrics["evaluation/bench/Chat"] == metrics["evaluation/bench/Reasoning"] == 1
    assert metrics["evaluation/bench/Chat Hard"] == 0
    assert metrics["evaluation/bench/score"] == pytest.approx(2 / 3)
    table = (tmp_path / "run/table.md").read_text()
    assert "| llmbar-natural | 1 | 0.000 |" in table
    assert (tmp_path / "run/reliability.png").is_file()


def test_version_2_file(tmp_path):
    def item(name, subset, chosen, rejected):
        return {"id": name, "prompt": "hi", "chosen": chosen, "rejected": rejected, "subset": subset, "num_correct": 1}

    rows = [
        item("1", "Math", ["longest"], ["a", "bb", "ccc"]),
        item("2", "Math", ["a"], ["longest", "bb", "ccc"]),
        item("ref:1", "Ties", ["long"], ["a", "bb"]),
        item("tied:1", "Ties", ["longer", "longes"], ["a", "bb"]),
    ]
    metrics = run("reward_bench_2", tmp_path / "run", write(tmp_path / "v2.jsonl", rows))
    # Ties: gap 4 and spread 0, reference gap 2: everything holds, and tanh(2 / 0) is 1: 1.01. Math: one of two.
    assert metrics["evaluation/subset/Math"] == 0.5
    assert metrics["evaluation/subset/Ties"] == pytest.approx(1.01)
    assert metrics["evaluation/bench/score"] == pytest.approx((0.5 + 1.01) / 2)


def test_a_task_without_a_table(tmp_path):
    module = import_recipe(RECIPE)
    values = {
        "reward": {"function": "rlhf.lm.tasks:vowel_share"},
        "task": {"name": "vowel_words", "train": 8, "held_out": 40},
        "run": {"directory": str(tmp_path / "run")},
    }
    metrics = module.main(validate(module.CONFIG, values))
    assert metrics["evaluation/accuracy"] == 1.0  # the gold scorer itself
    with pytest.raises(ConfigError, match="exactly one of `data`"):
        validate(module.CONFIG, {**values, "task": None})


@pytest.mark.skipif(not SHARED.exists(), reason="real pairs are not here")
def test_real_pairs_by_subset(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    metrics = run("hhh", tmp_path / "run")
    assert metrics["evaluation/prompts"] == 221
    assert {name for name in metrics if "subset/" in name} == {
        f"evaluation/subset/{name}" for name in ("harmless", "helpful", "honest", "other")
    }
