"""One PPO step, ours against TRL 1.12's experimental PPOTrainer, the last one there was: side by side.

    python -m venv /tmp/trl112
    /tmp/trl112/bin/pip install trl==1.12.0 transformers==5.23.0 torch==2.13.0
    python benchmarks/ppo.py --peer-python /tmp/trl112/bin/python      # writes benchmarks/results/ppo.{md,json}
    python benchmarks/ppo.py --peer-python /tmp/trl112/bin/python --parts time --cases tiny_32 --steps 20

TRL 1.16, which this project is installed with, has no PPO; hence a virtual environment of its own, and a process of its
own. The two take turns, step by step, so that a busy machine slows both alike. Both start from the same folders on the
CPU in float32: a policy, its frozen copy as the reference, a reward model, and a critic of its own that starts from the
reward model. A step is 64 completions of 64 prompts, KL in the reward (k1, 0.05), GAE, and in each epoch one optimizer
step on all 64. TRL takes the old log-probs from its generation; so does ours, as long as a forward every 20th step
finds that they agree (`old_log_probs: auto`). Ours keeps the critic's forward over the rollout for the first epoch
(`keep_forward`, which is off by default and takes memory). It scores text with the reward model as a recipe does
(decode, tokenize again), TRL scores token ids. Peak memory is that of a process for each side.

Cases `*_32`, `*_128`, `*_24` run every completion to that limit: the end token has a probability of 1e-9. In
`tiny_ends` the model ends a completion after 40 tokens on average, 128 at most. `wide_24` has the vocabulary of the
Qwen tokenizer, 151,665, under a small body, where the shared data lie beside the checkout. `*_epochs` takes TRL's
default of 4 epochs, `*_unkept` the same without the kept forward.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from peer import Peer
from ppo_report import write_results

ROWS, PROMPT_LENGTH = 64, 16
LEARNING_RATE = 1e-6
TOKENIZER = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "qwen2.5"
SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6},
    "wide": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
}
VOCABULARIES = {"tiny": 512, "small": 8192}
NEVER = 1e9


class Case(NamedTuple):
    """One row of the table."""

    model: str
    limit: int
    """Most tokens of a completion."""
    mean_length: float = NEVER
    epochs: int = 1
    keep_forward: bool = True


CASES = {
    "tiny_32": Case("tiny", 32),
    "tiny_128": Case("tiny", 128),
    "tiny_128_epochs": Case("tiny", 128, epochs=4),
    "tiny_128_epochs_unkept": Case("tiny", 128, epochs=4, keep_forward=False),
    "tiny_ends": Case("tiny", 128, mean_length=40.0),
    "small_128": Case("small", 128),
    "wide_24": Case("wide", 24),
}


def make_folders(folder: Path, case: Case) -> list[str]:
    """Write a random policy and a random reward model; returns prompts of random letters."""
    from reward_models.loading import make_reward_model
    from reward_models.scorer import RewardModelScorer
    from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm, load_tokenizer

    if case.model == "wide":
        tokenizer = load_tokenizer(TOKENIZER)
        letters = sorted(token for token in tokenizer.get_vocab() if len(token) == 1 and token.isalpha())
    else:
        letters = [chr(0x4E00 + index) for index in range(VOCABULARIES[case.model] - 3)]
        tokenizer = character_tokenizer("".join(letters))
    torch.manual_seed(0)
    shape = SHAPES[case.model]
    settings = {"model_type": "llama", **shape, "max_position_embeddings": 8 * (PROMPT_LENGTH + case.limit)}
    model: Any = load_causal_lm(ModelConfig(config=settings), tokenizer)
    set_end_probability(model, int(tokenizer.eos_token_id), len(tokenizer), case.mean_length)  # type: ignore[arg-type]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    reward_model = make_reward_model(ModelConfig(config=settings), tokenizer, seed=1)
    RewardModelScorer(reward_model, tokenizer).save_pretrained(folder / "reward")
    rows = torch.randint(len(letters), (512, PROMPT_LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    return ["".join(letters[index] for index in row) for row in rows]


@torch.no_grad()
def set_end_probability(model: Any, end: int, vocabulary: int, mean_length: float) -> None:
    """Give the end token probability 1 / mean_length everywhere: one hidden dimension is held constant and feeds it."""
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    level = model.model(torch.randint(3, vocabulary, (32, 64)))[0][..., 0].mean()
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[end] = 0.0
    model.lm_head.weight[end, 0] = torch.log(torch.tensor(vocabulary / (mean_length - 1))) / level


class Ours:
    """One step of this toolkit."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        from reward_models.scorer import RewardModelScorer
        from rlhf.core.algorithm import AlgorithmConfig
        from rlhf.core.presets import resolve_algorithm
        from rlhf.data.records import Prompt
        from rlhf.lm.actors import make_actors
        from rlhf.lm.collector import PromptCollector
        from rlhf.lm.collector_config import CollectorConfig
        from rlhf.lm.loading import ModelConfig
        from rlhf.lm.sampling import SamplingConfig
        from rlhf.training.distributed import make_accelerator
        from rlhf.training.learner import Learner
        from rlhf.training.update_config import UpdateConfig

        accelerator = make_accelerator()
        preset = {"preset": "ppo_rlhf", "epochs": settings["epochs"]}
        self.algorithm = AlgorithmConfig.model_validate(resolve_algorithm(preset))
        actors = make_actors(
            ModelConfig(path=str(folder / "policy")),
            self.algorithm,
            temperature=1.0,
            critic=str(folder / "reward"),
            accelerator=accelerator,
        )
        update = UpdateConfig(learning_rate=LEARNING_RATE, microbatch_tokens=4608, adam_epsilon=1e-8)
        self.learner = Learner(actors.policy, self.algorithm, update, accelerator=accelerator)
        sampling = SamplingConfig(max_completion_length=settings["limit"])
        self.collector = PromptCollector(
            [Prompt(text) for text in settings["prompts"]],
            policy=actors.policy,
            generator=actors.generator,
            tokenizer=actors.tokenizer,
            reward=RewardModelScorer.from_pretrained(folder / "reward"),
            config=CollectorConfig(
                prompts_per_iteration=settings["rows"],
                sampling=sampling,
                samples=0,
                keep_forward=settings["keep_forward"],
            ),
            reference=actors.reference,
        )
        self.lengths: list[float] = []

    def step(self) -> dict[str, float]:
        """Collect, credit, learn; returns the seconds it took, by the clock and of all threads."""
        from rlhf.core.estimate import estimate

        started, cpu = time.perf_counter(), time.process_time()
        rollout = self.collector.collect()
        self.learner.update(estimate(rollout, self.algorithm, kl_coef=0.05))
        self.lengths.append(rollout.metrics["rollout/length_mean"])
        return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}


def start_peer(python: str, folder: Path, settings: dict[str, Any]) -> Peer:
    """TRL's trainer in a process of its own."""
    script = str(Path(__file__).with_name("ppo_trl.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1"}
    environment["TRL_EXPERIMENTAL_SILENCE"] = "1"
    command = [python, script, "--folder", str(folder), "--settings", json.dumps(settings)]
    return Peer(command, folder, environment=environment)


def make_settings(folder: Path, case: Case, threads: int) -> dict[str, Any]:
    """Write the models of a case; returns what both sides must know."""
    return {
        "prompts": make_folders(folder, case),
        "limit": case.limit,
        "rows": ROWS,
        "epochs": case.epochs,
        "keep_forward": case.keep_forward,
        "threads": threads,
        "learning_rate": LEARNING_RATE,
    }


def measure_time(folder: Path, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Time both sides, taking turns."""
    ours, peer = Ours(folder, settings), start_peer(options.peer_python, folder, settings)
    turns = [(peer.step(), ours.step()) for _ in range(options.warm_up + options.steps)]
    peer.stop()
    shown = turns[options.warm_up :]
    return {
        "steps": options.steps,
        "trl_seconds": median(theirs["seconds"] for theirs, _ in shown),
        "our_seconds": median(own["seconds"] for _, own in shown),
        "ratio": median(theirs["seconds"] / own["seconds"] for theirs, own in shown),
        "cpu_ratio": median(theirs["cpu"] / own["cpu"] for theirs, own in shown),
        "our_length_mean": sum(ours.lengths) / len(ours.lengths),
    }


def measure_memory(folder: Path, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Peak resident GiB of a process for each side that makes two steps."""
    peer = start_peer(options.peer_python, folder, settings)
    theirs = [peer.step() for _ in range(2)][-1]["gib"]
    peer.stop()
    file = folder / "settings.json"
    file.write_text(json.dumps(settings))
    command = [sys.executable, __file__, "--alone", str(file)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"trl_gib": theirs, "our_gib": float(output.strip().splitlines()[-1])}


def run_alone(file: Path) -> None:
    """Make two of our steps and print the peak memory."""
    settings = json.loads(file.read_text())
    torch.set_num_threads(settings["threads"])
    ours = Ours(file.parent, settings)
    for _ in range(2):
        ours.step()
    # Not getrusage: its maximum is inherited from the parent through fork.
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20)


PARTS = {"time": measure_time, "memory": measure_memory}


def main() -> None:
    """Run the cases asked for; results of other cases and parts are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="Python of a virtual environment with TRL 1.12")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each side")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.alone:
        return run_alone(options.alone)
    if not options.peer_python or not Path(options.peer_python).exists():
        return print(
            "skipped: TRL's last PPO trainer needs a virtual environment of its own. Make it with\n"
            "    python -m venv /tmp/trl112\n"
            "    /tmp/trl112/bin/pip install trl==1.12.0 transformers==5.23.0 torch==2.13.0\n"
            "and pass --peer-python /tmp/trl112/bin/python"
        )
    torch.set_num_threads(options.threads)
    for name in options.cases:
        if CASES[name].model == "wide" and not TOKENIZER.is_dir():
            print(f"{name} skipped: no tokenizer at {TOKENIZER}")
            continue
        for part in options.parts:
            with tempfile.TemporaryDirectory() as scratch:
                settings = make_settings(Path(scratch), CASES[name], options.threads)
                measured = PARTS[part](Path(scratch), settings, options)
                epochs = {case: CASES[case].epochs for case in CASES}
                write_results(name, part, measured, threads=options.threads, epochs=epochs)
    return None


if __name__ == "__main__":
    main()
