"""Generation against transformers' own `model.generate`, side by side in one run.

    OMP_NUM_THREADS=2 python benchmarks/generation.py

Both sides use the same model object, prompts, temperature and number of samples, and take turns, so that a busy
machine slows both. Completions end through a bias on the end token: about one in 42 tokens ends a row, which makes
40 of at most 128 tokens on average; in the other case no row ends. A round's order is swapped every time.
Writes `benchmarks/results/generation.md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.lm.generation import TransformersGenerator
from rlhf.lm.loading import LoraSettings, add_lora
from rlhf.lm.sampling import SamplingConfig

RESULTS = Path(__file__).parent / "results"
PAD, END = 0, 2
SIZES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
    "small": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024},
}
SIZES["tiny_lora"] = SIZES["tiny"]  # with adapters of rank 16 on every linear layer
VOCABULARIES = {"tiny": 512, "small": 8192, "tiny_lora": 512}
# Rows that end with probability q per token, cut at 128, are (1 - (1 - q)^128) / q long on average: 40 at q = 0.0238.
END_PROBABILITY = {"full length": 0.0, "mean 40": 0.0238}
TARGETS = {"full length": 1.4, "mean 40": 2.5}


@dataclass(frozen=True)
class Measurement:
    """Seconds and tokens of one side in one round."""

    seconds: float
    mean_length: float


def make_model(size: str, end_probability: float) -> Any:
    """A random Llama whose next-token distribution is nearly uniform but for the end token."""
    torch.manual_seed(0)
    vocabulary = VOCABULARIES[size]
    config = LlamaConfig(
        vocab_size=vocabulary, pad_token_id=PAD, eos_token_id=END, tie_word_embeddings=True, **SIZES[size]
    )
    model = LlamaForCausalLM(config).eval()
    head = nn.Linear(config.hidden_size, vocabulary)
    head.weight = model.lm_head.weight
    head.weight.data[END] = 0.0  # the end token's logit is its bias alone
    nn.init.zeros_(head.bias)
    # The other logits z are normal with the variance s of a normalised state times a weight: the mean of exp(z) is
    # exp(s / 2).
    others = (vocabulary - 1) * math.exp(config.initializer_range**2 * config.hidden_size / 2)
    odds = end_probability / (1 - end_probability) * others
    head.bias.data[END] = math.log(odds) if odds > 0 else -1e9
    model.lm_head = head
    return add_lora(model, LoraSettings(rank=16)).eval() if size.endswith("_lora") else model


def make_prompts(count: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Left-padded prompts of different lengths: half of `length` to all of it."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(length // 2, length, count).long()
    mask = torch.arange(length)[None] >= length - lengths[:, None]
    ids = torch.randint(3, vocabulary, (count, length), generator=generator)
    return ids.masked_fill(~mask, PAD), mask


def make_sides(
    model: Any, prompts: tuple[Tensor, Tensor], *, group_size: int, length: int
) -> dict[str, Callable[[int], Tensor]]:
    """Two functions from a seed to the completion lengths [rows]."""
    ids, mask = prompts
    generator = TransformersGenerator(model, end_token_ids=END, pad_token_id=PAD)
    sampling = SamplingConfig(max_completion_length=length)
    repeated_ids, repeated_mask = ids.repeat_interleave(group_size, 0), mask.repeat_interleave(group_size, 0).long()

    def ours(seed: int) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        generation = generator.generate(ids, mask, group_size=group_size, sampling=sampling, generator=source)
        return generation.completion_mask.sum(dim=1)

    def theirs(seed: int) -> Tensor:
        torch.manual_seed(seed)
        sequences = model.generate(
            repeated_ids,
            attention_mask=repeated_mask,
            max_new_tokens=length,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        is_end = sequences[:, ids.shape[1] :] == END
        return ((is_end.cumsum(dim=1) - is_end.long()) == 0).sum(dim=1)

    return {"ours": ours, "generate": theirs}


def measure(sides: dict[str, Callable[[int], Tensor]], rounds: int) -> dict[str, list[Measurement]]:
    """Let the sides take turns; the first round warms up and is not counted."""
    results: dict[str, list[Measurement]] = {name: [] for name in sides}
    for seed in range(rounds + 1):
        for name in sorted(sides, reverse=seed % 2 == 0):
            start = time.perf_counter()
            lengths = sides[name](seed)
            seconds = time.perf_counter() - start
            if seed > 0:
                results[name].append(Measurement(seconds, float(lengths.float().mean())))
    return results


def summarize(size: str, case: str, results: dict[str, list[Measurement]]) -> dict[str, object]:
    """One row of the table: median times, median of the rounds' ratios and their range."""
    ratios = [b.seconds / a.seconds for a, b in zip(results["ours"], results["generate"], strict=True)]
    return {
        "model": size,
        "case": case,
        "ours_ms": round(1e3 * statistics.median(m.seconds for m in results["ours"])),
        "generate_ms": round(1e3 * statistics.median(m.seconds for m in results["generate"])),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "target": TARGETS[case],
        "mean_length_ours": round(statistics.mean(m.mean_length for m in results["ours"]), 1),
        "mean_length_generate": round(statistics.mean(m.mean_length for m in results["generate"]), 1),
    }


def write_results(rows: list[dict[str, object]], settings: argparse.Namespace) -> str:
    """Write the table as Markdown and JSON; return the Markdown."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    environment = {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_average": load,
        **vars(settings),
    }
    lines = [
        "# Generation: in-place decoding against `model.generate`",
        "",
        f"`OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/generation.py`: "
        f"{settings.prompts} prompts x {settings.group_size} samples, up to {settings.length} tokens, prompts of "
        f"{settings.prompt_length // 2} to {settings.prompt_length} tokens, float32 on a CPU with {os.cpu_count()} "
        f"cores, median of {settings.rounds} alternating rounds. torch {torch.__version__}, transformers "
        f"{transformers.__version__}; load average of the machine {load}.",
        "",
        "| model | completions | ours, ms | `generate`, ms | ratio (range) | target | mean length ours / theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ratio_range"]
        lines.append(
            f"| {row['model']} | {row['case']} | {row['ours_ms']} | {row['generate_ms']} | "
            f"**{row['ratio']}x** ({low}-{high}) | {row['target']}x | "
            f"{row['mean_length_ours']} / {row['mean_length_generate']} |"
        )
    text = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "generation.md").write_text(text, encoding="utf-8")
    content = json.dumps({"environment": environment, "rows": rows}, indent=2)
    (RESULTS / "generation.json").write_text(content + "\n", encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    settings = parser.parse_args()
    rows = []
    for size in settings.sizes:
        prompts = make_prompts(settings.prompts, settings.prompt_length, VOCABULARIES[size])
        for case, end_probability in END_PROBABILITY.items():
            model = make_model(size, end_probability)
            sides = make_sides(model, prompts, group_size=settings.group_size, length=settings.length)
            rows.append(summarize(size, case, measure(sides, settings.rounds)))
            print(rows[-1], flush=True)
    print(write_results(rows, settings))


if __name__ == "__main__":
    main()
