"""Supervised fine-tuning: ours against TRL's SFTTrainer at the same model, texts, batches and steps; side by side.

    python benchmarks/sft.py [--steps 8] [--rounds 5] [--threads N]

Ours runs inside TRL's trainer with tokenization and settings of its own, so what is measured is what those cost or
save. Both sides start from the same folder, in float32 on the CPU, and learn from the same prompts and completions in
the order of the same seed; a round trains each once, from tokenized rows to the last step, and the order of the sides
changes every round. Preparing the trainer (tokenization included) is timed apart. The losses of both are printed:
equal losses mean equal work. Peak memory is that of a process for each side that makes two steps with a vocabulary of
151,665, Qwen's size, under a narrow body. Writes benchmarks/results/sft.md and sft.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
BATCH_SIZE, MAX_LENGTH, LEARNING_RATE = 16, 128, 1e-4
SHAPE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
VOCABULARY = 2048
WIDE_SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE_VOCABULARY = 151_665


class Outcome(NamedTuple):
    """One side in one round."""

    preparation: float
    """Seconds until the trainer stands."""
    training: float
    """Seconds of all steps."""
    processor: float
    """Processor seconds of all steps, over all threads: what a busy machine blurs less."""
    loss: float
    """Mean over the steps."""


def make_model(folder: Path, *, wide: bool = False) -> None:
    """Write a random Llama and a tokenizer of one token per character; `make_texts` uses the first of them."""
    from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm

    rest = range(0x20000, 0x20000 + WIDE_VOCABULARY - VOCABULARY) if wide else range(0)
    letters = [*range(0x4E00, 0x4E00 + VOCABULARY - 3), *rest]
    tokenizer = character_tokenizer("".join(map(chr, letters)))
    torch.manual_seed(0)
    shape = WIDE_SHAPE if wide else SHAPE
    settings = {"model_type": "llama", **shape, "max_position_embeddings": MAX_LENGTH}
    load_causal_lm(ModelConfig(config=settings), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_texts(count: int) -> list[tuple[str, str]]:
    """Prompts of 8 to 32 and completions of 16 to 64 random characters."""
    generator = torch.Generator().manual_seed(1)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        ids = torch.randint(VOCABULARY - 3, (length,), generator=generator).tolist()
        return "".join(chr(0x4E00 + index) for index in ids)

    return [(text(8, 32), text(16, 64)) for _ in range(count)]


def our_trainer(folder: Path, texts: list[tuple[str, str]], steps: int) -> Any:
    """Ours, as `rlhf.lm.sft.train_sft` makes it."""
    from rlhf.data.records import Demonstration
    from rlhf.lm.loading import ModelConfig, load_causal_lm, load_tokenizer
    from rlhf.lm.sft import SftConfig, make_sft_trainer

    config = SftConfig(
        learning_rate=LEARNING_RATE,
        learning_rate_schedule="constant",
        warmup_fraction=0.0,
        max_steps=steps,
        batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH,
        precision="float32",
    )
    demonstrations = [Demonstration(prompt=prompt, completion=completion) for prompt, completion in texts]
    model = load_causal_lm(ModelConfig(path=str(folder)))
    return make_sft_trainer(model, load_tokenizer(folder), demonstrations, config=config, seed=0)


def trl_trainer(folder: Path, texts: list[tuple[str, str]], steps: int) -> Any:
    """TRL's own, with the same settings and nothing on that this comparison does not need."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH,
        completion_only_loss=True,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=10_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": text} for prompt, text in texts]),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


SIDES = {"ours": our_trainer, "trl": trl_trainer}


def run_once(side: str, folder: Path, texts: list[tuple[str, str]], steps: int) -> Outcome:
    """Prepare and train one side."""
    started = time.perf_counter()
    trainer = SIDES[side](folder, texts, steps)
    prepared, processor = time.perf_counter(), time.process_time()
    loss = trainer.train().training_loss
    return Outcome(prepared - started, time.perf_counter() - prepared, time.process_time() - processor, loss)


def measure_memory(threads: int) -> dict[str, float]:
    """Peak resident GiB of a process for each side."""
    peaks = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--alone", side, "--threads", str(threads)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[side] = float(output.strip().splitlines()[-1])
    return peaks


def run_alone(side: str) -> None:
    """Make two steps with the wide vocabulary and print the peak memory."""
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch), wide=True)
        run_once(side, Path(scratch), make_texts(2 * BATCH_SIZE), 2)
    # Not getrusage: its maximum is inherited from the parent through fork.
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20)


def write_results(outcomes: dict[str, list[Outcome]], peaks: dict[str, float], options: argparse.Namespace) -> None:
    """Write the table and the numbers behind it."""
    import transformers
    import trl as trl_library

    turns = list(zip(outcomes["trl"], outcomes["ours"], strict=True))
    ratio = median(trl.training / ours.training for trl, ours in turns)
    processor_ratio = median(trl.processor / ours.processor for trl, ours in turns)
    lines = [
        "# Supervised fine-tuning: ours against TRL's SFTTrainer",
        "",
        f"{options.steps} steps of {BATCH_SIZE} demonstrations, CPU float32, {options.threads} threads, median of "
        f"{options.rounds} alternating rounds; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"TRL {trl_library.__version__}. Written by `python benchmarks/sft.py`.",
        "",
        "| side | training s | its processor s | preparation s | mean loss |",
        "|---|---|---|---|---|",
    ]
    for side, rows in outcomes.items():
        lines.append(
            f"| {side} | {median(row.training for row in rows):.3f} | {median(row.processor for row in rows):.3f} "
            f"| {median(row.preparation for row in rows):.3f} | {rows[0].loss:.4f} |"
        )
    lines += ["", f"TRL's / ours, median of the rounds: training **{ratio:.2f}**, processor {processor_ratio:.2f}."]
    lines += [
        "",
        f"Peak memory of two steps, vocabulary {WIDE_VOCABULARY:,}: ours {peaks['ours']:.2f} GiB, TRL "
        f"{peaks['trl']:.2f} GiB ({peaks['ours'] / peaks['trl']:.2f}).",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sft.md").write_text("\n".join(lines) + "\n")
    rounds = {side: [row._asdict() for row in rows] for side, rows in outcomes.items()}
    (RESULTS / "sft.json").write_text(
        json.dumps({"ratio": ratio, "processor_ratio": processor_ratio, "peak_gib": peaks, "rounds": rounds}, indent=2)
        + "\n"
    )
    print("\n".join(lines))


def main() -> None:
    """Let the sides take turns; the first round warms up and is not counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.alone:
        return run_alone(options.alone)
    texts = make_texts(BATCH_SIZE * options.steps)
    outcomes: dict[str, list[Outcome]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch))
        for turn in range(options.rounds + 1):
            for side in sorted(SIDES, reverse=turn % 2 == 0):
                outcome = run_once(side, Path(scratch), texts, options.steps)
                print(f"round {turn}", side, outcome, flush=True)
                if turn > 0:
                    outcomes[side].append(outcome)
    write_results(outcomes, measure_memory(options.threads), options)
    return None


if __name__ == "__main__":
    main()
