"""Training on top of the core: learner, outer loop, run directory, checkpoints, metrics."""

from rlhf.training.distributed import make_accelerator, make_reduce, seed_everything
from rlhf.training.learner import Learner
from rlhf.training.loop import Collector, optimize_policy
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig
from rlhf.training.update_config import UpdateConfig

__all__ = [
    "Collector",
    "Learner",
    "Run",
    "RunConfig",
    "UpdateConfig",
    "make_accelerator",
    "make_reduce",
    "optimize_policy",
    "seed_everything",
]
