"""Started by torchrun: trains every scenario on two processes, replicated and sharded, for `test_sharded`.

accelerate shards on GPUs only, so that the accelerator is told here that it does; the rest is what runs on GPUs.
"""

import json
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import rlhf.lm.fine_tuning as fine_tuning
from rlhf.config import validate
from rlhf.training.distributed import end_worker

MODEL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 2, "max_position_embeddings": 64}
SCENARIOS = {
    "grpo_tied": {"algorithm": "grpo", "model": {"config": {**MODEL, "tie_word_embeddings": True}}},
    "ppo_copy_ema": {"algorithm": "ppo_rlhf", "critic": "copy", "ema": {"decay": 0.5, "evaluate": True}},
    "resumed_lora": {"algorithm": "ppo_rlhf", "model": {"config": MODEL, "lora": {"rank": 2}}},
}


def settings(folder, **changes):
    return {
        "model": {"config": MODEL},
        "prompts": {"task": {"name": "sort_letters", "word_length": 3, "letters": 5, "train": 40, "held_out": 3}},
        "reward": {"function": "tests.recipes.test_language_recipes:share_of_a"},
        "collector": {"prompts_per_iteration": 4, "group_size": 4, "sampling": {"max_completion_length": 5}},
        "update": {"learning_rate": 1e-2, "microbatch_tokens": 40},
        "iterations": 2,
        "evaluation": {"samples_per_prompt": 2, "prompts_per_batch": 1},  # 2 prompts here, 1 there
        "run": {"directory": str(folder), "progress_bar": False, "evaluate_every": 1, "checkpoint_every": 1},
        **changes,
    }


def shard():
    state = AcceleratorState._shared_state
    state["distributed_type"] = DistributedType.FSDP
    state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )


def train(name, folder):
    if name.startswith("resumed"):
        fine_tuning.fine_tune(read(settings(folder, **SCENARIOS[name]) | {"iterations": 1}), recipe=name)
        values = settings(folder, **SCENARIOS[name])
        values["run"]["resume"] = True
        return fine_tuning.fine_tune(read(values), recipe=name)
    return fine_tuning.fine_tune(read(settings(folder, **SCENARIOS[name])), recipe=name)


def read(values):
    return validate(fine_tuning.FineTuningConfig, values)


def main(folder):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    fine_tuning.make_accelerator = lambda **arguments: accelerator
    for kind in ("replicated", "sharded"):
        if kind == "sharded":
            shard()
            assert accelerator.is_fsdp2
        for name in SCENARIOS:
            metrics = train(name, Path(folder) / kind / name)
            file = Path(folder) / kind / f"{name}_{accelerator.process_index}.json"
            file.write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(sys.argv[1])
    end_worker()
