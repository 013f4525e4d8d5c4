"""reasoning-gym's tasks: with a stand-in for the package, and, where it is installed, with the package itself."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from rlhf.errors import ConfigError, RewardError
from rlhf.lm.reasoning import ReasoningGymConfig, make_reasoning_prompts
from rlhf.lm.sources import SourceConfig, load_demonstration_sets, load_prompt_sets
from rlhf.rewards.protocol import RewardLog, score_completions
from rlhf.rewards.reasoning import ReasoningGym

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym (the extra `reasoning`)"
)


@pytest.fixture
def package(monkeypatch):
    """Sums: question "seed+number", answer the sum; half credit for a number off by one, an error for words."""

    def create(name, *, size, seed, step=1):
        if name != "sums":
            raise ValueError(f"Dataset '{name}' not registered")
        return [
            {
                "question": f"{seed}+{number * step}",
                "answer": str(seed + number * step),
                "metadata": {"source_dataset": name},
            }
            for number in range(size)
        ]

    def verify(answer, entry):
        distance = abs(int(answer) - int(entry["answer"]))
        return {0: 1.0, 1: 0.5}.get(distance, 0.0)

    module = SimpleNamespace(create_dataset=create, get_score_answer_fn=lambda name: verify)
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(RewardError, match=r"cannot be imported.*pip install 'rlhf-toolkit\[reasoning\]'"):
        ReasoningGym()


def test_verifiers_judge_what_stands_in_the_tags(package):
    entry = {"question": "1+2", "answer": "3", "metadata": {"source_dataset": "sums"}}
    texts = ["<answer>1</answer> no: <answer> 3 </answer>", "<answer>4</answer>", "3", "<answer>three</answer>"]
    log = RewardLog()
    scores = score_completions(
        ReasoningGym(), prompts=[""] * 4, completions=texts, columns={"entry": [entry] * 4}, log=log
    )
    assert scores.tolist() == [1.0, 0.5, 0.0, 0.0]
    assert log.metrics == {"reasoning_gym_untagged": [0.25], "reasoning_gym_failed": [0.25]}
    assert ReasoningGym(untagged_score=None)(["3", "4"], entry=[entry] * 2) == [1.0, 0.5]
    with pytest.raises(RewardError, match="does not say which task"):
        ReasoningGym()(["<answer>3</answer>"], entry=[{"question": "1+2"}])


def test_prompts_carry_their_records_and_none_is_held_out_and_trained(package):
    source = SourceConfig(reasoning_gym={"tasks": {"sums": {"step": 2}}, "train": 5, "held_out": 3, "seed": 4})
    train, held_out = load_prompt_sets(source)
    assert [prompt.columns["answer"] for prompt in train] == ["4", "6", "8", "10", "12"]
    assert [prompt.columns["entry"]["question"] for prompt in held_out] == ["5+0", "5+2", "5+4"]
    assert train[0].prompt[-1] == {"role": "user", "content": "4+0"}
    assert "<answer>" in train[0].prompt[0]["content"]
    plain, _ = make_reasoning_prompts(ReasoningGymConfig(tasks={"sums": {}}, train=1, held_out=1, chat=False))
    assert plain[0].prompt == "0+0"


def test_what_the_package_refuses_is_a_config_error(package):
    with pytest.raises(ConfigError, match=r"reasoning_gym\.tasks\.products: reasoning-gym refuses the task"):
        make_reasoning_prompts(ReasoningGymConfig(tasks={"products": {}}))
    with pytest.raises(ConfigError, match="refuses the task"):
        make_reasoning_prompts(ReasoningGymConfig(tasks={"sums": {"terms": 3}}))
    with pytest.raises(ConfigError, match="no demonstrations"):
        load_demonstration_sets(SourceConfig(reasoning_gym={"tasks": {"sums": {}}}))
    with pytest.raises(ValueError, match="exactly one"):
        SourceConfig(task={"name": "sort_letters"}, reasoning_gym={"tasks": {"sums": {}}})


@needs_package
@pytest.mark.parametrize(
    "task",
    ["chain_sum", "basic_arithmetic", "letter_counting", "spell_backward", "simple_equations", "prime_factorization",
     "word_sorting", "shortest_path", "mini_sudoku", "family_relationships", "syllogism", "base_conversion"],
)  # fmt: skip
def test_the_package_accepts_its_own_answers(task):
    train, held_out = make_reasoning_prompts(ReasoningGymConfig(tasks={task: {}}, train=20, held_out=5))
    entries = [prompt.columns["entry"] for prompt in train + held_out]
    right = [f"<answer>{entry['answer']}</answer>" for entry in entries]
    assert ReasoningGym()(right, entry=entries) == [1.0] * len(entries)
    assert max(ReasoningGym()(["<answer>-987654</answer>"] * len(entries), entry=entries)) < 1.0
