"""One GRPO step, ours against TRL's GRPOTrainer: equal model, prompts, lengths, updates, threads; side by side.

    python benchmarks/grpo.py                       # every case; writes benchmarks/results/grpo.{md,json}, on a GPU
                                                    # grpo_gpu.{md,json}
    python benchmarks/grpo.py --threads 1           # grpo_one_thread.{md,json}
    python benchmarks/grpo.py --cases tiny_32 --steps 20

The table is written after each case. Rows of cases that are not run again stay, if they were measured with the same
versions and threads.

Both start from the same folder, on a CPU in float32, and make one optimizer step per rollout of 8 prompts x 8
completions, without a KL term. Each side has a process of its own, since what one asks of the C library's allocator
would serve the other too; they take turns, step by step, so that a busy machine slows both alike. Peak memory is
measured in further processes. TRL skips the old-log-prob forward in this setting; ours is measured with it
(`recompute`) and without (`auto`, the default, which makes it every 20th step).

On a GPU (`gpu_` cases) weights are float32 and products bfloat16 on both sides, by autocast; TRL generates through
transformers, as it does without vLLM. Memory is then what torch allocated on the GPU at most.

Cases without an end run every completion to the limit: the end token lies outside the model's vocabulary. In
`tiny_ends` the model ends a completion after 40 tokens on average, 128 at most. `wide_24` has a small body under a
vocabulary of 151,665: that of the Qwen tokenizer where its folder is found (`--tokenizer`), else as many characters.
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
from typing import Any

import torch
from grpo_cases import CASES, TOKENIZER, make_model, prompts_of, runs_on_gpu
from grpo_report import environment, kept_results, write_results
from peer import Peer

PROMPTS, GROUP = 8, 8
LEARNING_RATE = 1e-6


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Something cheap that differs between completions."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


class Ours:
    """One step of this toolkit."""

    def __init__(self, folder: Path, limit: int, old_log_probs: str, *, gpu: bool) -> None:
        from rlhf.core.algorithm import AlgorithmConfig
        from rlhf.core.presets import resolve_algorithm
        from rlhf.data.records import Prompt
        from rlhf.lm.actors import make_generator
        from rlhf.lm.collector import PromptCollector
        from rlhf.lm.collector_config import CollectorConfig
        from rlhf.lm.loading import ModelConfig, load_causal_lm, load_tokenizer
        from rlhf.lm.policy import LanguageModelPolicy
        from rlhf.lm.sampling import SamplingConfig
        from rlhf.training.distributed import make_accelerator
        from rlhf.training.learner import Learner
        from rlhf.training.update_config import UpdateConfig

        algorithm = AlgorithmConfig.model_validate(resolve_algorithm({"preset": "grpo", "kl": {"type": "none"}}))
        tokenizer = load_tokenizer(folder)
        accelerator = make_accelerator(mixed_precision="bf16" if gpu else "no")
        model = load_causal_lm(ModelConfig(path=str(folder))).to(accelerator.device)
        policy, generator = LanguageModelPolicy(model), make_generator(model, tokenizer, accelerator=accelerator)
        config = CollectorConfig(
            prompts_per_iteration=PROMPTS,
            group_size=GROUP,
            sampling=SamplingConfig(max_completion_length=limit),
            old_log_probs=old_log_probs,
            samples=0,
        )
        tokens = 2**15 if gpu else 4608
        update = UpdateConfig(learning_rate=LEARNING_RATE, microbatch_tokens=tokens, adam_epsilon=1e-8)
        self.algorithm = algorithm
        self.learner = Learner(policy, algorithm, update, accelerator=accelerator)
        self.collector = PromptCollector(
            [Prompt(text) for text in prompts_of(folder, 256)],
            policy=policy,
            generator=generator,
            tokenizer=tokenizer,
            reward=reward,
            config=config,
            algorithm=algorithm,
            accelerator=accelerator,
        )
        self.generation_seconds = 0.0
        self.lengths: list[float] = []
        self._time_generation(generator)

    def _time_generation(self, generator: Any) -> None:
        inner = generator.generate

        def timed(*arguments: Any, **named: Any) -> Any:
            started = _now()
            try:
                return inner(*arguments, **named)
            finally:
                self.generation_seconds += _now() - started

        generator.generate = timed

    def step(self) -> None:
        """Collect, credit, learn."""
        from rlhf.core.estimate import estimate

        rollout = self.collector.collect()
        self.learner.update(estimate(rollout, self.algorithm))
        self.lengths.append(rollout.metrics["rollout/length_mean"])


def make_trl(folder: Path, limit: int, steps: int, scratch: Path, *, gpu: bool) -> Any:
    """TRL's trainer with the same settings, and nothing on that this comparison does not need."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    warnings.filterwarnings("ignore", category=FutureWarning)
    arguments = GRPOConfig(
        output_dir=str(scratch),
        use_cpu=not gpu,
        bf16=gpu,
        gradient_checkpointing=False,
        per_device_train_batch_size=PROMPTS * GROUP,
        gradient_accumulation_steps=1,
        num_generations=GROUP,
        num_iterations=1,
        max_completion_length=limit,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="grpo",
        scale_rewards="group",
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
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts_of(folder, 256)]),
        reward_funcs=reward,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_turns(case: str, folder: Path, steps: int) -> None:
    """TRL's process: print seconds, generation seconds and mean length of each step, and wait for a line before it."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            self._wait()

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            told = {"seconds": _now() - self._started, "generation": generation[0], "length": lengths[-1]}
            print("STEP " + json.dumps(told), flush=True)
            self._wait()

        def _wait(self) -> None:
            print("READY", flush=True)
            if not sys.stdin.readline():
                sys.exit(0)
            self._started, generation[0] = _now(), 0.0

    trainer = make_trl(folder, CASES[case].limit, steps, folder / "trl", gpu=runs_on_gpu(case))
    generation = _time_method(trainer, "_generate_single_turn")
    lengths = _record_lengths(trainer)
    trainer.add_callback(Turns())
    trainer.train()


def compare(case: str, folder: Path, steps: int, warm_up: int) -> dict[str, Any]:
    """Time both sides, taking turns."""
    limit, gpu = CASES[case].limit, runs_on_gpu(case)
    peer = Peer(side_command(case, "turns", folder, steps + warm_up), folder)
    ours = {name: Ours(folder, limit, name, gpu=gpu) for name in ("recompute", "auto")}
    theirs: list[dict[str, float]] = []
    seconds: dict[str, list[float]] = {name: [] for name in ours}
    for _ in range(steps + warm_up):
        theirs.append(peer.step())
        for name, side in ours.items():
            started = _now()
            side.step()
            seconds[name].append(_now() - started)
    peer.stop()
    shown = {"trl": [step["seconds"] for step in theirs], **seconds}
    shown = {name: values[warm_up:] for name, values in shown.items()}
    result: dict[str, Any] = {"case": case, "steps": steps}
    for name, values in shown.items():
        result[f"{name}_seconds"] = median(values)
    for name, side in ours.items():
        result[f"{name}_ratio"] = median(t / o for t, o in zip(shown["trl"], shown[name], strict=True))
        result[f"{name}_generation_share"] = side.generation_seconds / sum(seconds[name])
    result["trl_generation_share"] = sum(step["generation"] for step in theirs) / sum(
        step["seconds"] for step in theirs
    )
    result["trl_length_mean"] = sum(step["length"] for step in theirs) / len(theirs)
    result["our_length_mean"] = sum(ours["recompute"].lengths) / len(ours["recompute"].lengths)
    return result


def _now() -> float:
    """Seconds, when all that was started on the GPU has ended."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _time_method(owner: Any, name: str) -> list[float]:
    inner, total = getattr(owner, name), [0.0]

    def timed(*arguments: Any, **named: Any) -> Any:
        started = _now()
        try:
            return inner(*arguments, **named)
        finally:
            total[0] += _now() - started

    setattr(owner, name, timed)
    return total


def _record_lengths(trainer: Any) -> list[float]:
    inner, lengths = trainer._generate_and_score_completions, []

    def recorded(*arguments: Any, **named: Any) -> Any:
        output = inner(*arguments, **named)
        lengths.append(output["completion_mask"].sum(1).float().mean().item())
        return output

    trainer._generate_and_score_completions = recorded
    return lengths


def side_command(case: str, side: str, folder: Path, steps: int) -> list[str]:
    """How a process for one side is started."""
    command = [sys.executable, __file__, "--cases", case, "--side", side, "--folder", str(folder)]
    return [*command, "--steps", str(steps), "--threads", str(torch.get_num_threads())]


def measure_memory(case: str, side: str, folder: Path, steps: int) -> float:
    """Peak GiB (resident, or on the GPU) of a process that makes a few steps of one side."""
    command = side_command(case, side, folder, steps)
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    return float(output.strip().splitlines()[-1])


def run_side(case: str, side: str, folder: Path, steps: int) -> None:
    """Make steps of one side alone and print the peak memory."""
    limit, gpu = CASES[case].limit, runs_on_gpu(case)
    if side == "turns":
        run_turns(case, folder, steps)
        return
    if side == "trl":
        make_trl(folder, limit, steps, folder / "trl", gpu=gpu).train()
    else:
        ours = Ours(folder, limit, side, gpu=gpu)
        for _ in range(steps):
            ours.step()
    if gpu:
        print(torch.cuda.max_memory_allocated() / 2**30)
        return
    # Not getrusage: its maximum is inherited from the parent through fork.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 2**20)


def measure_case(name: str, *, steps: int | None, warm_up: int, wide_tokenizer: Path) -> dict[str, Any]:
    """Time and memory of one case."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = make_model(folder, CASES[name], wide_tokenizer)
        # Memory first: each side has a process of its own, and this one is still small.
        memory = {f"{side}_gib": measure_memory(name, side, folder, 2) for side in ("trl", "auto")}
        result = compare(name, folder, steps or CASES[name].steps, warm_up)
    return result | memory | {"tokenizer": tokenizer}


def _cases_here() -> list[str]:
    return [case for case in CASES if runs_on_gpu(case) == torch.cuda.is_available()]


def main() -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=_cases_here())
    parser.add_argument("--steps", type=int, help="measured steps of each side, instead of the case's own number")
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="folder of the wide model's tokenizer")
    parser.add_argument("--side", choices=["trl", "turns", "recompute", "auto"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.side:
        return run_side(options.cases[0], options.side, options.folder, options.steps)
    measured_with = environment(options.threads)
    results = kept_results(options.cases, measured_with)
    for case in options.cases:
        results[case] = measure_case(
            case, steps=options.steps, warm_up=options.warm_up, wide_tokenizer=options.tokenizer
        )
        write_results(results, measured_with)
    return None


if __name__ == "__main__":
    main()
