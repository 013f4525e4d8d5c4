"""Settings every test runs under: one thread, no GPU, no hub, no telemetry, the same examples of a property."""

import os

from hypothesis import settings

# Set before any test imports torch or transformers; CI machines share their cores, and tests never reach the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("MPLBACKEND", "Agg")

# Expected values are those of a CPU, on every machine; tests/lm/test_on_gpu.py runs by `make test-gpu`.
if os.environ.get("RLHF_TEST_ON_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# The same examples on every machine, however loaded: a property that fails, fails for everyone.
settings.register_profile("toolkit", deadline=None, derandomize=True)
settings.load_profile("toolkit")
