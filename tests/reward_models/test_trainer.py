"""Training: the gradient under any split of a step, what is refused, what comes out."""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from reward_models.losses import AllPairs, BestOf, Margin, PlackettLuce
from reward_models.recording import optimize_reward_model
from reward_models.settings import Centering, RewardModelConfig, prompt_losses
from reward_models.trainer import make_trainer, train_reward_model
from rlhf.data.records import Ranking
from rlhf.errors import ConfigError, DataError, TrainingError
from rlhf.training import Run, RunConfig

SLOW = {"learning_rate": 1e-3, "learning_rate_schedule": "constant"}


def make_rankings(count, *, seed=0, scores=False):
    """Rankings of 2 to 4 candidates of different lengths: more a's are better."""
    generator = torch.Generator().manual_seed(seed)
    rankings = []
    for _ in range(count):
        number = int(torch.randint(2, 5, (1,), generator=generator))
        good = torch.randperm(6, generator=generator)[:number].tolist()
        completions = tuple("a" * a + "b" * (7 - a) + "c" * (a % 3) for a in good)
        ranks = tuple(sum(other > a for other in good) for a in good)
        rankings.append(Ranking("xy>", completions, ranks, tuple(float(a) for a in good) if scores else None))
    return rankings


def train(model, tokenizer, settings, *, count=12, seed=0, scores=False):
    rankings = make_rankings(count, scores=scores)
    return train_reward_model(
        model, tokenizer, rankings, held_out=make_rankings(4, seed=9), settings=settings, seed=seed
    )


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("changes", [{"microbatch_prompts": 2}, {"microbatch_prompts": 1}, {"chunk_tokens": 1}])
def test_any_split_of_a_step_gives_the_same_weights(tokenizer, reward_model, changes):
    # Ten prompts in steps of six: the last step is short, where a mean of microbatch means would be wrong.
    other = copy.deepcopy(reward_model)
    # Adam with a large epsilon: tiny differences of tiny gradients are not blown up.
    whole = RewardModelConfig(batch_prompts=6, adam_epsilon=1e-2, max_grad_norm=1e9, **SLOW)
    train(reward_model, tokenizer, whole, count=10)
    train(other, tokenizer, whole.model_copy(update=changes), count=10)
    torch.testing.assert_close(weights(other), weights(reward_model), atol=2e-6, rtol=1e-5)


def test_first_step_is_the_gradient_of_the_mean_over_prompts(tokenizer, reward_model):
    rankings = make_rankings(7)
    settings = RewardModelConfig(batch_prompts=8, microbatch_prompts=2, **SLOW)
    trainer = make_trainer(reward_model, tokenizer, rankings, held_out=rankings, settings=settings)
    losses = []
    for ranking in trainer.rankings:
        batch = trainer.data_collator([ranking])
        scores = reward_model(batch["input_ids"], batch["attention_mask"]).unsqueeze(0)
        losses.append(prompt_losses(scores, batch, settings=settings))
    expected = torch.autograd.grad(torch.cat(losses).mean(), list(reward_model.parameters()))
    seen = []
    trainer.args.max_grad_norm = 0.0
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    hook = trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append([parameter.grad.clone() for parameter in reward_model.parameters()])
    )
    result = trainer.train()
    hook.remove()
    for ours, gradient in zip(seen[0], expected, strict=True):
        torch.testing.assert_close(ours, gradient, atol=1e-6, rtol=1e-4)
    assert result.training_loss == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


def test_centering_is_added_to_the_ranking_loss(tokenizer, reward_model):
    settings = RewardModelConfig(centering=Centering(coefficient=0.5))
    batch = {"ranks": torch.tensor([[1, 0]]), "mask": torch.ones(1, 2, dtype=torch.bool)}
    loss = prompt_losses(torch.tensor([[1.0, 3.0]]), batch, settings=settings)
    # log(1 + e^-2) + 0.5 x (1 + 9) / 2
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)) + 2.5, abs=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        AllPairs(margin=Margin(per="gold_score", size=0.1), label_smoothing=0.05),
        PlackettLuce(),
        PlackettLuce(top_m=1, divide_by="choices"),
        BestOf(),
    ],
    ids=["all_pairs", "plackett_luce", "top_1", "best_of"],
)
def test_every_loss_learns(tokenizer, reward_model, loss):
    settings = RewardModelConfig(loss=loss, learning_rate=3e-3, batch_prompts=8, epochs=3)
    metrics = train(reward_model, tokenizer, settings, count=64, scores=True)
    assert metrics["evaluation/accuracy"] > 0.8


def test_training_score_is_the_evaluation_score(tokenizer, reward_model):
    metrics = train(reward_model, tokenizer, RewardModelConfig(batch_prompts=4, **SLOW))
    assert (
        0 <= metrics["evaluation/accuracy_low"] <= metrics["evaluation/accuracy"] <= metrics["evaluation/accuracy_high"]
    )
    assert metrics["evaluation/prompts"] == 4


def test_same_seed_same_weights(tokenizer, reward_model):
    models = [copy.deepcopy(reward_model) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        train(model, tokenizer, RewardModelConfig(batch_prompts=4, **SLOW), seed=seed)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))


# --- within a run -------------------------------------------------------------------------------------------------


def run_once(model, tokenizer, directory, **run):
    rankings = make_rankings(12)
    settings = RewardModelConfig(batch_prompts=4, **SLOW)
    trainer = make_trainer(model, tokenizer, rankings, held_out=rankings[:4], settings=settings)
    config = RunConfig(directory=str(directory), progress_bar=False, **run)
    return optimize_reward_model(trainer, Run(config, resolved=settings, iterations=trainer.optimizer_steps))


def test_run_records_every_step_and_the_summary(tmp_path, tokenizer, reward_model):
    run_once(reward_model, tokenizer, tmp_path / "run", evaluate_every=2)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [0, 1, 2, 3]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in records[1:])
    assert ["evaluation/accuracy" in record for record in records] == [True, False, True, True]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["metrics"]["evaluation/pairs"] > 0
    assert summary["metrics"]["train/truncated_candidates"] == 0


def test_resumed_run_ends_with_the_same_weights(tmp_path, tokenizer, reward_model, monkeypatch):
    straight, stopped, resumed = (copy.deepcopy(reward_model) for _ in range(3))
    run_once(straight, tokenizer, tmp_path / "straight", checkpoint_every=1)

    def stop_after_two(self, iteration, *arguments, original=Run.finish_iteration):
        if iteration == 3:
            raise KeyboardInterrupt
        original(self, iteration, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_iteration", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            run_once(stopped, tokenizer, tmp_path / "run", checkpoint_every=1)
    run_once(resumed, tokenizer, tmp_path / "run", checkpoint_every=1, resume=True)
    torch.testing.assert_close(weights(resumed), weights(straight), atol=0, rtol=0)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3]


def test_resume_without_model_checkpoint_is_refused(tmp_path, tokenizer, reward_model):
    run_once(copy.deepcopy(reward_model), tokenizer, tmp_path / "run")
    with pytest.raises(ConfigError, match="no model checkpoint"):
        run_once(reward_model, tokenizer, tmp_path / "run", resume=True)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_margins_by_score_need_scores(tokenizer, reward_model):
    settings = RewardModelConfig(loss=AllPairs(margin=Margin(per="gold_score")))
    with pytest.raises(DataError, match="need scores"):
        train(reward_model, tokenizer, settings)


def test_uneven_microbatches_are_refused(tokenizer, reward_model):
    with pytest.raises(ConfigError, match="multiple of"):
        train(reward_model, tokenizer, RewardModelConfig(batch_prompts=6, microbatch_prompts=4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bfloat16_without_a_gpu_is_refused(tokenizer, reward_model):
    with pytest.raises(ConfigError, match="needs a GPU"):
        train(reward_model, tokenizer, RewardModelConfig(precision="bfloat16"))


def test_longer_than_the_context_is_refused(tokenizer, reward_model):
    with pytest.raises(ConfigError, match="exceeds the model's context"):
        train(reward_model, tokenizer, RewardModelConfig(max_length=65))
    with pytest.raises(DataError, match="longer than max_length=5"):
        train(reward_model, tokenizer, RewardModelConfig(max_length=5))


def test_loss_that_is_not_finite_stops_the_run(tokenizer, reward_model):
    with torch.no_grad():
        reward_model.classifier.score.weight.fill_(math.inf)
    with pytest.raises(TrainingError, match="optimizer step 1: the ranking loss is not finite"):
        train(reward_model, tokenizer, RewardModelConfig(batch_prompts=4))


# --- processes ----------------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import sys, torch
from reward_models.loading import make_reward_model, prepare_tokenizer
from reward_models.settings import RewardModelConfig
from reward_models.trainer import train_reward_model
from rlhf.data.records import Ranking
from rlhf.lm.loading import ModelConfig, character_tokenizer
torch.set_num_threads(1)
tokenizer = prepare_tokenizer(character_tokenizer("abcxy>"))
config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
model = make_reward_model(ModelConfig(config=config), tokenizer)
rankings = [Ranking("xy>", ("a" * i, "b" * (9 - i), "c")[: 2 + i % 2], (0, 1, 2)[: 2 + i % 2]) for i in range(1, 9)]
settings = RewardModelConfig(batch_prompts=4, learning_rate=1e-3, adam_epsilon=1e-2)
train_reward_model(model, tokenizer, rankings, held_out=rankings, settings=settings)
import torch.distributed as dist
if not dist.is_initialized() or dist.get_rank() == 0:
    torch.save([parameter.detach() for parameter in model.parameters()], sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    for name, start in (("one", []), ("two", launcher)):
        command = [sys.executable, *start, str(script), str(tmp_path / name)]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=1e-5)
