"""One GRPO step, ours against TRL's GRPOTrainer: equal model, prompts, lengths, updates, threads; side by side.

    python benchmarks/grpo.py                       # every case; writes benchmarks/results/grpo.{md,json}, on a GPU
                                                    # grpo_gpu.{md,json}
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
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

PROMPTS, GROUP, PROMPT_LENGTH = 8, 8, 16
LEARNING_RATE = 1e-6
RESULTS = Path(__file__).parent / "results"
MODELS = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab": 512,
    },
    "small": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "vocab": 8192,
    },
    "wide": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab": 151_665,
    },
    "half_billion": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab": 151_665,
    },
    "one_and_a_half_billion": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab": 151_665,
    },
}
"""Shapes; the last two are Qwen2.5-0.5B's and -1.5B's, with an output matrix of its own."""


class Case(NamedTuple):
    """What is measured in one row of the table."""

    model: str
    limit: int
    """Most tokens of a completion."""
    ends: bool
    steps: int
    """Measured steps of each side."""


CASES = {
    "tiny_32": Case("tiny", 32, ends=False, steps=15),
    "tiny_128": Case("tiny", 128, ends=False, steps=11),
    "tiny_ends": Case("tiny", 128, ends=True, steps=11),
    "small_128": Case("small", 128, ends=False, steps=3),
    "wide_24": Case("wide", 24, ends=False, steps=3),
    "gpu_05b_256": Case("half_billion", 256, ends=False, steps=3),
    "gpu_05b_ends": Case("half_billion", 256, ends=True, steps=3),
    "gpu_15b_256": Case("one_and_a_half_billion", 256, ends=False, steps=2),
}
TOKENIZER = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "qwen2.5"
"""Of the wide model; see `--tokenizer`."""
MEAN_LENGTH = 40
"""Of completions in cases with an end."""


def make_model(folder: Path, case: Case, wide_tokenizer: Path) -> str:
    """Write a random Llama and its tokenizer; return what the tokenizer is."""
    from rlhf.lm.loading import ModelConfig, load_causal_lm, load_tokenizer

    shape = dict(MODELS[case.model])
    vocabulary = shape.pop("vocab")
    real = vocabulary == 151_665 and wide_tokenizer.is_dir()
    tokenizer = load_tokenizer(wide_tokenizer) if real else _one_token_per_character(vocabulary)
    assert len(tokenizer) == vocabulary, f"{wide_tokenizer} has {len(tokenizer)} tokens, not {vocabulary}"
    torch.manual_seed(0)
    settings = {"model_type": "llama", **shape, "max_position_embeddings": 1024}
    model = load_causal_lm(ModelConfig(config=settings), tokenizer)
    if case.ends:
        _make_ends_likely(model, tokenizer.eos_token_id, vocabulary)
    else:
        tokenizer.add_special_tokens({"eos_token": "<never>"})  # one past the vocabulary: the model cannot write it
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return wide_tokenizer.name if real else "one token per character"


def _one_token_per_character(vocabulary: int) -> Any:
    from rlhf.lm.loading import character_tokenizer

    first = 0x4E00 if vocabulary < 20_000 else 0x20000  # past the surrogates, which are no characters
    return character_tokenizer("".join(chr(first + index) for index in range(vocabulary - 3)))


@torch.no_grad()
def _make_ends_likely(model: Any, end: int, vocabulary: int) -> None:
    """Give the end token probability 1 / MEAN_LENGTH everywhere: one hidden dimension is held constant and feeds it."""
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    ids = torch.randint(3, vocabulary, (8, 64))
    level = model.model(ids)[0][..., 0].mean()
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[end] = 0.0
    model.lm_head.weight[end, 0] = torch.log(torch.tensor(vocabulary / (MEAN_LENGTH - 1))) / level


def prompts_of(folder: Path, count: int) -> list[str]:
    """Random prompts of equal length."""
    from rlhf.lm.loading import load_tokenizer

    letters = sorted(token for token in load_tokenizer(folder).get_vocab() if len(token) == 1)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(len(letters), (count, PROMPT_LENGTH), generator=generator).tolist()
    return ["".join(letters[index] for index in row) for row in rows]


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
        tokens = 2**15 if gpu else 2048
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
            sys.stdin.readline()
            self._started, generation[0] = _now(), 0.0

    trainer = make_trl(folder, CASES[case].limit, steps, folder / "trl", gpu=runs_on_gpu(case))
    generation = _time_method(trainer, "_generate_single_turn")
    lengths = _record_lengths(trainer)
    trainer.add_callback(Turns())
    trainer.train()


class Peer:
    """TRL's trainer in a process of its own."""

    def __init__(self, case: str, folder: Path, steps: int) -> None:
        self._log = (folder / "peer.log").open("w+")
        self._process = subprocess.Popen(
            side_command(case, "turns", folder, steps),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._read_until_ready()

    def step(self) -> dict[str, float]:
        """Let it make one step; what it tells of it."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read_until_ready()

    def stop(self) -> None:
        """Let it end."""
        self._process.communicate("\n")
        self._log.close()

    def _read_until_ready(self) -> dict[str, float]:
        assert self._process.stdout is not None
        told: dict[str, float] = {}
        for line in self._process.stdout:
            if line.startswith("STEP "):
                told = json.loads(line.removeprefix("STEP "))
            if line.strip() == "READY":
                return told
        self._log.seek(0)
        sys.exit(f"TRL's process stopped:\n{self._log.read()[-3000:]}")


def compare(case: str, folder: Path, steps: int, warm_up: int) -> dict[str, Any]:
    """Time both sides, taking turns."""
    limit, gpu = CASES[case].limit, runs_on_gpu(case)
    peer = Peer(case, folder, steps + warm_up)
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


def runs_on_gpu(case: str) -> bool:
    """Whether a case is one for a GPU."""
    return case.startswith("gpu_")


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


def environment(threads: int) -> str:
    """What every row of one table must have in common."""
    import transformers
    import trl

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
    return f"{machine}, {threads} threads, {versions}"


def kept_results(cases: Sequence[str], measured_with: str) -> dict[str, dict[str, Any]]:
    """Rows of an earlier table of the same environment whose cases are not run now."""
    path = RESULTS / f"{_table_name()}.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    if not isinstance(earlier, dict) or earlier.get("environment") != measured_with:
        return {}
    return {row["case"]: row for row in earlier["rows"] if row["case"] in CASES and row["case"] not in cases}


def _table_name() -> str:
    return "grpo_gpu" if torch.cuda.is_available() else "grpo"


def write_results(results: dict[str, dict[str, Any]], measured_with: str) -> None:
    """Write the table and the numbers behind it."""
    rows = [results[case] for case in CASES if case in results]
    lines = [
        "# One GRPO step: ours against TRL's GRPOTrainer",
        "",
        f"8 prompts x 8 completions, one optimizer step, no KL term, float32 weights, {measured_with}. "
        "Medians; the ratio is the median over turns of TRL's time / ours. Written by `python benchmarks/grpo.py`, "
        "which says what the cases are.",
        "",
        "| case | TRL s | ours s | ratio | ours with that forward s | ratio | generation share TRL / ours "
        "| mean length TRL / ours | peak GiB TRL / ours | ours / TRL |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['case']} | {r['trl_seconds']:.3f} | {r['auto_seconds']:.3f} | {r['auto_ratio']:.2f} "
            f"| {r['recompute_seconds']:.3f} | {r['recompute_ratio']:.2f} "
            f"| {r['trl_generation_share']:.0%} / {r['auto_generation_share']:.0%} "
            f"| {r['trl_length_mean']:.1f} / {r['our_length_mean']:.1f} "
            f"| {r['trl_gib']:.2f} / {r['auto_gib']:.2f} | {r['auto_gib'] / r['trl_gib']:.2f} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{_table_name()}.md").write_text("\n".join(lines) + "\n")
    (RESULTS / f"{_table_name()}.json").write_text(
        json.dumps({"environment": measured_with, "rows": rows}, indent=2) + "\n"
    )
    print("\n".join(lines), flush=True)


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
