"""The TRL side of `benchmarks/ppo.py`, run by the Python of a virtual environment that has TRL 1.12.

Prints one line of JSON per step, and waits for a line on stdin before the next, so that the two sides take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class TakeTurns(TrainerCallback):
    """Reports a step and waits to be asked for the next."""

    def __init__(self) -> None:
        self.started, self.cpu = time.perf_counter(), time.process_time()

    def on_train_begin(self, args, state, control, **named):
        """Wait for the first turn."""
        self._wait()

    def on_step_end(self, args, state, control, **named):
        """Report and wait."""
        seconds, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
        print("STEP " + json.dumps({"seconds": seconds, "cpu": cpu, "gib": peak}))
        self._wait()

    def _wait(self) -> None:
        print("READY", flush=True)
        if sys.stdin.readline().strip() != "step":
            sys.exit(0)
        self.started, self.cpu = time.perf_counter(), time.process_time()


def main() -> None:
    """Train as told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    options = parser.parse_args()
    settings, folder = options.settings, options.folder
    torch.set_num_threads(settings["threads"])
    warnings.filterwarnings("ignore")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    prompts = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in settings["prompts"]])
    rows = settings["rows"]
    arguments = PPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=settings["epochs"],
        local_rollout_forward_batch_size=rows,
        total_episodes=rows * 10_000,
        response_length=settings["limit"],
        stop_token="eos",
        temperature=1.0,
        kl_coef=0.05,
        vf_coef=0.1,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        num_sample_generations=0,
        logging_steps=10_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )

    def classifier():
        return AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, dtype=torch.float32)

    def policy():
        return AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)

    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy(),
        ref_model=policy(),
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=prompts,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TakeTurns())
    trainer.train()


if __name__ == "__main__":
    main()
