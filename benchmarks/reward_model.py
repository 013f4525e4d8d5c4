"""A reward model from K-way rankings, ours against TRL's RewardTrainer on the exploded pairs of the same rankings.

    python benchmarks/reward_model.py       # K = 4 and 9, three seeds; writes benchmarks/results/reward_model.{md,json}
    python benchmarks/reward_model.py --candidates 4 --seeds 1
    python benchmarks/reward_model.py --data ../shared/data/rankings/alpaca_eval_k16.jsonl.gz --candidates 4 9

Both start from the same folder, see the same tokens of the same rankings, one epoch, equally many prompts in an
optimizer step, the same learning rate and schedule, float32, no dropout. TRL gets every pair of a prompt, so each
completion of it K - 1 times; it is given the pairs tokenized, in forwards of at most as many rows as 48 pairs have.
Ours gets each completion once, in forwards of similar length. Time is of `train()` alone, wall clock and the process's
CPU, the two taking turns seed by seed, the first of them changing with the seed; tokens (padding included) are counted
where they enter the model's body. Held-out accuracy is measured with one and the same scorer for both.

Without `--data`, rankings are procedural: random words of 16 to 56 letters, ranked by their share of vowels.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from reward_models.collation import EncodedRanking, encode_rankings
from reward_models.evaluation import evaluate_scores, score_rankings
from reward_models.loading import make_reward_model, prepare_tokenizer
from reward_models.model import RewardModel
from reward_models.settings import RewardModelConfig
from reward_models.trainer import RankingTrainer, make_trainer
from rlhf.data.loading import load_rankings, split_holdout
from rlhf.data.records import Ranking, dense_ranks
from rlhf.data.settings import DataConfig
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_tokenizer

RESULTS = Path(__file__).parent / "results"
MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
ALPHABET = "abcdefghijklmnopqrstuvwxyz>"
LEARNING_RATE, BATCH_PROMPTS, PAIRS_PER_FORWARD = 1e-3, 4, 48
PROMPTS = {4: 192, 9: 64}
"""To learn from, by K; a hundred for others."""
HELD_OUT = 256
MAX_LENGTH = 256
"""Of real texts; longer ones lose their end."""


def make_words(count: int, num_candidates: int, *, seed: int) -> list[Ranking]:
    """Rankings of random words by their share of vowels; equal shares tie."""
    generator = random.Random(seed)
    rankings = []
    while len(rankings) < count:
        words = ["".join(generator.choices(ALPHABET[:-1], k=generator.randint(16, 56))) for _ in range(num_candidates)]
        shares = [sum(letter in "aeiou" for letter in word) / len(word) for word in words]
        ranking = Ranking("word>", tuple(words), dense_ranks([-share for share in shares]))
        if not ranking.tied:
            rankings.append(ranking)
    return rankings


def load_data(
    path: str | None, num_candidates: int, count: int
) -> tuple[list[Ranking], list[Ranking], PreTrainedTokenizerBase]:
    """Rankings to learn from, held out, and a tokenizer."""
    if path is None:
        tokenizer = prepare_tokenizer(character_tokenizer(ALPHABET))
        words = make_words(count, num_candidates, seed=0), make_words(HELD_OUT, num_candidates, seed=1)
        return *words, tokenizer
    rankings = load_rankings(DataConfig(path=path, columns={"completions": "responses"}, order="scores", tied="drop"))
    cut = [_thin(one, num_candidates) for one in rankings if len(one.completions) >= num_candidates]
    train, held_out = split_holdout([one for one in cut if not one.tied], fraction=0.3)
    return (
        train[:count],
        held_out,
        prepare_tokenizer(load_tokenizer("../shared/data/tokenizers/gpt2")),
    )


def _thin(ranking: Ranking, count: int) -> Ranking:
    """Candidates evenly spread from the best to the worst."""
    order = sorted(range(len(ranking.ranks)), key=lambda index: ranking.ranks[index])
    kept = [order[round(place * (len(order) - 1) / (count - 1))] for place in range(count)]
    texts = tuple(ranking.completions[index] for index in kept)
    return Ranking(ranking.prompt, texts, dense_ranks([ranking.ranks[index] for index in kept]))


# --- the two sides ------------------------------------------------------------------------------------------------


def make_ours(folder: Path, train: list[Ranking], held_out: list[Ranking], tokenizer: Any, seed: int) -> RankingTrainer:
    """Our trainer on rankings."""
    model = make_reward_model(ModelConfig(path=str(folder)), tokenizer)
    settings = RewardModelConfig(
        learning_rate=LEARNING_RATE, batch_prompts=BATCH_PROMPTS, max_length=MAX_LENGTH, overlong="truncate"
    )
    return make_trainer(model, tokenizer, train, held_out=held_out, settings=settings, seed=seed)


def make_trl(folder: Path, encoded: Sequence[EncodedRanking], tokenizer: Any, seed: int, scratch: Path) -> Any:
    """TRL's trainer on the pairs of the same encoded rankings."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    pairs: dict[str, list[Any]] = {"chosen_ids": [], "rejected_ids": []}
    for one in encoded:
        for a, b in combinations(range(len(one.ranks)), 2):
            if one.ranks[a] != one.ranks[b]:
                better, worse = (a, b) if one.ranks[a] < one.ranks[b] else (b, a)
                pairs["chosen_ids"].append(one.sequences[better])
                pairs["rejected_ids"].append(one.sequences[worse])
    candidates = max(len(one.ranks) for one in encoded)
    pairs_per_step = BATCH_PROMPTS * candidates * (candidates - 1) // 2
    arguments = RewardConfig(
        output_dir=str(scratch),
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        per_device_train_batch_size=min(pairs_per_step, PAIRS_PER_FORWARD),
        gradient_accumulation_steps=max(pairs_per_step // PAIRS_PER_FORWARD, 1),
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        seed=seed,
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    return RewardTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(pairs), processing_class=tokenizer
    )


def measure(train: Callable[[], Any], body: torch.nn.Module) -> dict[str, float]:
    """Run a training; its seconds, and the tokens that entered the body."""
    tokens = 0

    def count(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        nonlocal tokens
        tokens += (arguments[0] if arguments else named["input_ids"]).numel()

    hook = body.register_forward_pre_hook(count, with_kwargs=True)
    wall, cpu = time.perf_counter(), time.process_time()
    train()
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    hook.remove()
    return {**seconds, "tokens": float(tokens)}


def compare(num_candidates: int, *, seeds: int, data: str | None, count: int) -> dict[str, Any]:
    """Train both sides once a seed, in turns."""
    train, held_out, tokenizer = load_data(data, num_candidates, count)
    limits: dict[str, Any] = {"max_length": MAX_LENGTH, "overlong": "truncate"}
    encoded, _ = encode_rankings(train, tokenizer, **limits)
    encoded_held_out, _ = encode_rankings(held_out, tokenizer, **limits)
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            folder = Path(scratch) / f"start_{seed}"
            start = make_reward_model(ModelConfig(config={**MODEL, "vocab_size": len(tokenizer)}), tokenizer, seed=seed)
            start.save_pretrained(folder, tokenizer)
            ours = make_ours(folder, train, held_out, tokenizer, seed)
            theirs = make_trl(folder, encoded, tokenizer, seed, Path(scratch) / "trl")
            sides = {"ours": (ours, ours.reward_model), "trl": (theirs, RewardModel(theirs.model))}
            for side in sorted(sides, reverse=bool(seed % 2)):
                trainer, model = sides[side]
                measured = measure(trainer.train, getattr(model.classifier, model.classifier.base_model_prefix))
                scores = score_rankings(model, encoded_held_out, pad_id=tokenizer.pad_token_id or 0)
                accuracy = evaluate_scores(scores, encoded_held_out)["accuracy"]
                runs[side].append({**measured, "accuracy": accuracy, "steps": float(trainer.state.global_step)})
                print(f"K={num_candidates} seed {seed} {side}: {runs[side][-1]}", flush=True)
    return {"candidates": num_candidates, "prompts": len(encoded), "held_out": len(encoded_held_out), **summarize(runs)}


def summarize(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians and ratios (median over seeds of TRL / ours), mean accuracies, and every run."""
    summary: dict[str, Any] = {"runs": runs}
    for name in ("wall", "cpu", "tokens"):
        summary |= {f"{side}_{name}": median(run[name] for run in mine) for side, mine in runs.items()}
        ratios = [theirs[name] / ours[name] for ours, theirs in zip(runs["ours"], runs["trl"], strict=True)]
        summary[f"{name}_ratio"] = median(ratios)
    summary |= {f"{side}_accuracy": mean(run["accuracy"] for run in mine) for side, mine in runs.items()}
    return summary


def write_results(results: list[dict[str, Any]], *, name: str, threads: int, command: str) -> None:
    """Write the table and the numbers behind it."""
    import transformers
    import trl

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
    seeds = len(results[0]["runs"]["ours"])
    lines = [
        "# A reward model from K-way rankings: ours against TRL's RewardTrainer on their pairs",
        "",
        f"Llama 128 wide x 4 layers, one epoch, {BATCH_PROMPTS} prompts a step, CPU float32, {threads} threads, "
        f"{seeds} seeds, {versions}. Medians over seeds; accuracies are means. Written by `{command}`.",
        "",
        "| K | prompts | TRL s | ours s | ratio | CPU ratio | TRL tokens | ours tokens | ratio "
        "| held-out accuracy TRL | ours | per seed TRL | ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        each = {side: " ".join(f"{run['accuracy']:.3f}" for run in r["runs"][side]) for side in ("trl", "ours")}
        lines.append(
            f"| {r['candidates']} | {r['prompts']} | {r['trl_wall']:.1f} | {r['ours_wall']:.1f} "
            f"| {r['wall_ratio']:.2f} | {r['cpu_ratio']:.2f} "
            f"| {r['trl_tokens']:,.0f} | {r['ours_tokens']:,.0f} | {r['tokens_ratio']:.2f} "
            f"| {r['trl_accuracy']:.3f} | {r['ours_accuracy']:.3f} | {each['trl']} | {each['ours']} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 9])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, help="to learn from; as measured: 192 for K = 4, 64 for K = 9")
    parser.add_argument("--data", help="a rankings file with `responses`, best first, and `scores`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    results = [
        compare(k, seeds=options.seeds, data=options.data, count=options.prompts or PROMPTS.get(k, 100))
        for k in options.candidates
    ]
    command = "python benchmarks/reward_model.py" + (f" --data {options.data}" if options.data else "")
    name = "reward_model" + ("_real" if options.data else "")
    write_results(results, name=name, threads=options.threads, command=command)


if __name__ == "__main__":
    main()
