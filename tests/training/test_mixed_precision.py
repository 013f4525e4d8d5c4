"""bfloat16 on the CPU, in a process of its own: accelerate's precision is one per process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys, torch
sys.path.insert(0, "tests/training")
from small_worlds import ActorCritic, make_experience
from rlhf.core.presets import ALGORITHMS
from rlhf.training import Learner, UpdateConfig, make_accelerator
from rlhf.training.distributed import refuse_unsupported
accelerator = make_accelerator(mixed_precision="bf16")
experience = make_experience()
for flatten in (False, True):
    exact = ActorCritic()
    expected = exact(experience.inputs, experience.actions).log_probs
    policy = ActorCritic()
    update = UpdateConfig(learning_rate=1e-2, flatten_parameters=flatten)
    learner = Learner(policy, ALGORITHMS["ppo_rlhf"], update, accelerator=accelerator)
    output = policy(experience.inputs, experience.actions)
    assert output.log_probs.dtype == output.values.dtype == torch.float32
    difference = (output.log_probs - expected).abs().max().item()
    assert 0 < difference < 0.1, difference  # bfloat16 was used: close, not equal
    losses = [learner.update(experience)["policy_loss"] for _ in range(4)]
    assert losses[-1] < losses[0] - 0.05, losses
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
accelerator.state._mixed_precision = "fp16"
try:
    refuse_unsupported(accelerator)
except ValueError as error:
    assert "Set mixed_precision to bf16" in str(error)
else:
    raise AssertionError("float16 was accepted")
"""


def test_bfloat16_learns_and_returns_float32():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
