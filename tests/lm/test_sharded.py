"""FSDP2 on two processes gives what two replicas give: metrics, models, moving averages, resumed runs. On CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.lm.sharded_processes import SCENARIOS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/lm/sharded_processes.py"), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def timeless(file):
    return {name: value for name, value in json.loads(file.read_text()).items() if not name.startswith("time/")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_shards_learn_what_replicas_learn(folder, name):
    expected = timeless(folder / "replicated" / f"{name}_0.json")
    first, second = (timeless(folder / "sharded" / f"{name}_{rank}.json") for rank in (0, 1))
    assert first == pytest.approx(second)
    assert first == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["grpo_tied/model", "ppo_copy_ema/model", "ppo_copy_ema/model_ema", "resumed_lora/model"]
)
def test_saved_models_are_the_same_ordinary_folders(folder, path):
    name = "adapter_model.safetensors" if "lora" in path else "model.safetensors"
    expected, found = (load_file(folder / kind / path / name) for kind in ("replicated", "sharded"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4)
    if "lora" not in path:
        AutoModelForCausalLM.from_pretrained(folder / "sharded" / path)


def test_the_shipped_settings_are_those_that_are_tested():
    settings = yaml.safe_load((ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert settings["fsdp_version"] == 2
    assert settings["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert settings["fsdp_cpu_ram_efficient_loading"] is False
