"""What the plain policy gradients share: steps of the shared learner on credits of their own making."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import Tensor

from classic_rl.policy import ActorCritic
from rlhf.core.algorithm import AlgorithmConfig
from rlhf.core.types import Experience, Rollout
from rlhf.training.learner import Learner
from rlhf.training.update_config import UpdateConfig


class RolloutLearner:
    """Learns from rollouts directly: its credits need more than the shared core's `estimate` gives.

    Args:
        policy: What learns.
        algorithm: What of it the shared core does.
        update: How the weights move.
        accelerator: None makes one.
        seed: Of permutations.

    Attributes:
        policy, algorithm: As given; collectors read them.
        learner: The shared one.
        reduce: Sums a tensor over processes.
        replicated: Checkpoints need the state of one process only.
    """

    replicated = True

    def __init__(
        self,
        policy: ActorCritic,
        algorithm: AlgorithmConfig,
        update: UpdateConfig,
        *,
        accelerator: Accelerator | None = None,
        seed: int = 0,
    ) -> None:
        self.policy, self.algorithm = policy, algorithm
        self.learner = Learner(policy, algorithm, update, accelerator=accelerator, seed=seed)
        self.reduce = self.learner.reduce

    def update(self, rollout: Rollout, *, progress: float = 0.0, progress_step: float = 0.0) -> dict[str, float]:
        """Learn from one rollout; returns metrics.

        Args:
            rollout: The rows of this process.
            progress: Share of the run that is done, in [0, 1]; drives the schedules.
            progress_step: Share of the run that this update is; warm-up reads it.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.learner.load_state_dict(state)


def credited(rollout: Rollout, credits: Tensor) -> Experience:
    """Return an experience whose actions' log-probabilities are multiplied by `credits` [B, T]."""
    return Experience(
        inputs=rollout.inputs,
        actions=rollout.actions,
        action_mask=rollout.action_mask,
        old_log_probs=rollout.old_log_probs,
        advantages=credits,
    )
