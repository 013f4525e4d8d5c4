"""A reward model from K-way rankings, ours against TRL's RewardTrainer on the exploded pairs of the same rankings.

    python benchmarks/reward_model.py          # everything; writes benchmarks/results/reward_model.{md,json}
    python benchmarks/reward_model.py --parts speed --cases alpaca_k4 --seeds 3

Both sides start from the same folder (a random Llama, 128 wide x 4 layers, 1.1M parameters beside the embedding), see
the same tokens of the same rankings in one pass, with equally many optimizer steps (but for `*_twice`), float32, no
dropout. TRL gets every pair of a prompt, so each completion of it K - 1 times, tokenized beforehand; ours gets each
completion once.

speed: `train()` alone on a few prompts, the sides in turns; tokens (padding included) are counted where they enter the
body. TRL's forwards take a whole step, as halves of it were no faster.
tuning: validation accuracy of each side at the learning rates `RATES`, mean over `TUNING_SEEDS`.
accuracy: `--seeds` further seeds, each side at its best rate, on held-out rankings, all scored by one scorer. The
interval resamples prompts, not seeds.
memory: peak resident size of a process that makes two steps, with Qwen's vocabulary of 151,665 tokens.

Cases `alpaca_*` are AlpacaEval's answers ranked by GPT-4's preference (K = 4; K = 9 of 16, evenly spread), where the
shared data lie beside the checkout; `words_*` are random words ranked by their share of vowels. With one prompt a step,
as in `alpaca_k9`, a step of ours has the pairs of one prompt, while TRL's has as many pairs drawn from all prompts;
`alpaca_k9_4` takes 4 prompts a step. In `*_twice` ours makes two passes over the rankings, which still take a fraction
of TRL's time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent.parent))

from reward_model_data import CASES, SHARED, Split, available, explode, load_case
from reward_model_report import kept_results, write_results

from reward_models.collation import EncodedRanking, RankingCollator, encode_rankings
from reward_models.evaluation import bootstrap_accuracy, pair_outcomes, score_rankings
from reward_models.loading import make_reward_model, prepare_tokenizer
from reward_models.model import RewardModel
from reward_models.settings import RewardModelConfig
from reward_models.trainer import make_trainer
from rlhf.lm.fused_training import FusedPass
from rlhf.lm.fused_training_probe import exact_fused_pass
from rlhf.lm.loading import ModelConfig, load_tokenizer
from rlhf.lm.token_layout import TokenLayout

MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TIMED_RATE = 1e-3
TUNING_SEEDS = (1000, 1001)
PAIRS_PER_FORWARD = {4: 24, 9: 36}
"""TRL's `per_device_train_batch_size`: a whole step, as half of it was no faster."""
SIDES = ("trl", "ours")
KEPT = Path("runs") / "benchmark_reward_model"
"""Finished trainings of `tuning` and `accuracy`, which a second call does not repeat; delete it after changes."""


class Trial:
    """One side before one training."""

    def __init__(self, side: str, folder: Path, split: Split, *, max_length: int, rate: float, seed: int) -> None:
        """Make the side's trainer from the model in `folder`."""
        self.side, self.pad_id = side, int(split.tokenizer.pad_token_id or 0)  # pyright: ignore[reportArgumentType]
        if side == "ours":
            self.trainer: Any = make_ours(folder, split, max_length=max_length, rate=rate, seed=seed)
            classifier = self.trainer.reward_model.classifier
        else:
            self.trainer = make_trl(folder, split, max_length=max_length, rate=rate, seed=seed)
            classifier = self.trainer.model
        self.body = getattr(classifier, classifier.base_model_prefix)

    def train(self) -> dict[str, float]:
        """Train; seconds by the clock and of the processor, and the tokens that entered the body."""
        tokens = 0

        def count(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            nonlocal tokens
            tokens += (arguments[0] if arguments else named["input_ids"]).numel()

        def count_fused(fused: FusedPass, layout: TokenLayout, wanted: Tensor | None = None) -> Tensor:
            nonlocal tokens
            tokens += len(layout.ids)
            return run_fused(fused, layout, wanted)

        run_fused, FusedPass.__call__ = FusedPass.__call__, count_fused  # it computes the body without calling it
        fuses = self.side == "ours" and exact_fused_pass(self.body) is not None  # a hook would switch that off
        hook = None if fuses else self.body.register_forward_pre_hook(count, with_kwargs=True)
        wall, processor = time.perf_counter(), time.process_time()
        self.trainer.train()
        measured = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - processor}
        if hook is not None:
            hook.remove()
        FusedPass.__call__ = run_fused
        return {**measured, "tokens": float(tokens), "steps": float(self.trainer.state.global_step)}

    def outcomes(self, rankings: Sequence[EncodedRanking]) -> tuple[Tensor, Tensor]:
        """Pairs won and pairs, [P] each, by one scorer for both sides."""
        # Made after training: TRL's must run on the layers that its users have.
        model = self.trainer.reward_model if self.side == "ours" else RewardModel(self.trainer.model)
        batch = RankingCollator(self.pad_id)(rankings)
        scores = score_rankings(model, rankings, pad_id=self.pad_id)
        return pair_outcomes(scores, batch["ranks"], mask=batch["mask"])


def encode(split: Split, part: str, max_length: int) -> list[EncodedRanking]:
    """Token ids of one part."""
    limits: dict[str, Any] = {"max_length": max_length, "overlong": "truncate", "inner_end": "text"}
    return encode_rankings(getattr(split, part), split.tokenizer, **limits)[0]


def make_ours(folder: Path, split: Split, *, max_length: int, rate: float, seed: int) -> Any:
    """Our trainer on rankings."""
    settings = RewardModelConfig(
        learning_rate=rate,
        batch_prompts=split.batch_prompts,
        epochs=split.our_passes,
        max_length=max_length,
        overlong="truncate",
        inner_end="text",
    )
    model = make_reward_model(ModelConfig(path=str(folder)), split.tokenizer)
    return make_trainer(model, split.tokenizer, split.train, held_out=split.validation, settings=settings, seed=seed)


def make_trl(folder: Path, split: Split, *, max_length: int, rate: float, seed: int) -> Any:
    """TRL's trainer on the pairs of the same encoded rankings."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import RewardConfig, RewardTrainer

    encoded = encode(split, "train", max_length)
    candidates = len(encoded[0].ranks)
    pairs_per_step = split.batch_prompts * candidates * (candidates - 1) // 2
    rows = PAIRS_PER_FORWARD[candidates]
    arguments = RewardConfig(
        output_dir=str(folder / "trl"),
        num_train_epochs=1,
        learning_rate=rate,
        lr_scheduler_type="linear",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=pairs_per_step // rows,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10_000,
        disable_tqdm=True,
        seed=seed,
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    dataset = Dataset.from_dict(explode(encoded))
    trainer = RewardTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=split.tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_start(folder: Path, tokenizer: Any, seed: int) -> Path:
    """Write the model that both sides start from."""
    start = make_reward_model(ModelConfig(config={**MODEL, "vocab_size": len(tokenizer)}), tokenizer, seed=seed)
    start.save_pretrained(folder, tokenizer)
    return folder


# --- the parts ----------------------------------------------------------------------------------------------------


def run_once(name: str, split: Split, *, side: str, rate: float, seed: int, judged_on: str) -> dict[str, Any]:
    """Train one side and judge it: accuracy, optimizer steps, and the pairs won of every prompt. Kept in `KEPT`."""
    trains_alike = name.removesuffix("_twice") if side == "trl" else name
    file = KEPT / f"{trains_alike}_{side}_{rate:g}_seed{seed}_{judged_on}.json"
    if file.is_file():
        return json.loads(file.read_text())
    case = CASES[name]
    rankings = encode(split, judged_on, case.max_length)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_start(Path(scratch), split.tokenizer, seed)
        trial = Trial(side, folder, split, max_length=case.max_length, rate=rate, seed=seed)
        measured = trial.train()
        won, pairs = trial.outcomes(rankings)
    result = {**measured, "accuracy": float(won.sum() / pairs.sum()), "won": won.tolist(), "pairs": pairs.tolist()}
    print(name, side, rate, "seed", seed, judged_on, measured, f"{result['accuracy']:.4f}", flush=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))
    return result


def tune(name: str) -> dict[str, Any]:
    """Validation accuracy of each side at each learning rate, mean over `TUNING_SEEDS`."""
    split = load_case(name)

    def accuracy(side: str, rate: float) -> float:
        runs = [run_once(name, split, side=side, rate=rate, seed=seed, judged_on="validation") for seed in TUNING_SEEDS]
        return mean(run["accuracy"] for run in runs)

    return {side: {f"{rate:g}": accuracy(side, rate) for rate in RATES} for side in SIDES}


def judge(name: str, seeds: int) -> dict[str, Any]:
    """Held-out accuracy of both sides at their tuned rates."""
    split, tuned = load_case(name), kept_results().get(name, {}).get("tuning")
    if tuned is None:
        sys.exit(f"{name}: the learning rates are not tuned yet; run the part `tuning` first")
    rates = {side: float(max(tuned[side], key=lambda rate: tuned[side][rate])) for side in SIDES}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for seed in range(seeds):
        for side in SIDES:
            runs[side].append(run_once(name, split, side=side, rate=rates[side], seed=seed, judged_on="held_out"))
    each = {side: [run["accuracy"] for run in runs[side]] for side in SIDES}
    steps = {side: runs[side][0]["steps"] for side in SIDES}
    return {"prompts": len(split.train), "rates": rates, "steps": steps, "each_seed": each, **summarize_accuracy(runs)}


def time_training(name: str, rounds: int) -> dict[str, Any]:
    """Time both sides on the first prompts, in turns, the first of them changing every round."""
    case, split = CASES[name], load_case(name)
    split = replace(split, train=split.train[: case.timed_prompts], validation=split.validation[:2], held_out=[])
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_start(Path(scratch), split.tokenizer, 0)
        for index in range(rounds):
            for side in sorted(SIDES, reverse=bool(index % 2)):
                trial = Trial(side, folder, split, max_length=case.max_length, rate=TIMED_RATE, seed=index)
                runs[side].append(trial.train())
                print(name, "round", index, side, runs[side][-1], flush=True)
    summary: dict[str, Any] = {"prompts": len(split.train), "runs": runs}
    for quantity in ("wall", "cpu", "tokens"):
        summary |= {f"{side}_{quantity}": median(run[quantity] for run in runs[side]) for side in SIDES}
        ratios = [trl[quantity] / ours[quantity] for trl, ours in zip(runs["trl"], runs["ours"], strict=True)]
        summary[f"{quantity}_ratio"] = median(ratios)
    return summary


def summarize_accuracy(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Mean accuracy over seeds with an interval over prompts, for each side and for the paired difference."""
    pairs = torch.tensor(runs["ours"][0]["pairs"])
    won = {side: torch.tensor([run["won"] for run in mine]).mean(dim=0) for side, mine in runs.items()}
    summary: dict[str, Any] = {"held_out": len(pairs)}
    for side in SIDES:
        accuracy = bootstrap_accuracy(won[side], pairs)
        summary[side] = {"accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high}
    gap = bootstrap_accuracy(won["ours"] - won["trl"], pairs)
    return summary | {"difference": {"mean": gap.value, "low": gap.low, "high": gap.high}}


def measure_memory(name: str) -> dict[str, Any]:
    """Peak resident GiB of a process for each side."""
    command = [sys.executable, __file__, "--cases", name, "--threads", str(torch.get_num_threads())]
    sizes = {}
    for side in SIDES:
        output = subprocess.run([*command, "--alone", side], check=True, capture_output=True, text=True).stdout
        sizes[f"{side}_gib"] = float(output.strip().splitlines()[-1])
    return sizes


def run_alone(name: str, side: str) -> None:
    """Make two steps with Qwen's vocabulary and print the peak memory."""
    case, split = CASES[name], load_case(name)
    tokenizer = prepare_tokenizer(load_tokenizer(str(SHARED / "tokenizers" / "qwen2.5")))
    split = replace(
        split,
        train=split.train[: 2 * case.batch_prompts],
        validation=split.validation[:2],
        held_out=[],
        tokenizer=tokenizer,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_start(Path(scratch), tokenizer, 0)
        Trial(side, folder, split, max_length=case.max_length, rate=TIMED_RATE, seed=0).train()
    # Not getrusage: its maximum is inherited from the parent through fork.
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20)


def main() -> None:
    """Run the parts asked for; results of other parts and cases are kept."""
    parts: dict[str, Callable[[str, int], dict[str, Any]]] = {
        "memory": lambda name, _: measure_memory(name),
        "speed": time_training,
        "tuning": lambda name, _: tune(name),
        "accuracy": judge,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--seeds", type=int, default=3, help="or rounds, of `speed`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.alone:
        return run_alone(options.cases[0], options.alone)
    for name in available(options.cases):
        for part in options.parts:
            write_results(name, part, parts[part](name, options.seeds), threads=options.threads)
    return None


if __name__ == "__main__":
    main()
