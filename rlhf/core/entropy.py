"""The coefficient of the entropy bonus, steered towards a target entropy."""

from __future__ import annotations

import math

from rlhf.core.algorithm import AdaptiveEntropy
from rlhf.errors import TrainingError


class EntropyCoefficient:
    """Rises by a step after every update whose entropy lay below the target, falls by one after the others.

    `c <- c + step` where entropy < target, else `max(0, c - step)`; the bonus acts only while entropy <= target.
    Source: He et al. 2025 (Skywork-OR1), https://arxiv.org/abs/2505.22312.

    Args:
        initial: The coefficient at the start; it acts until the first entropy is known.
        config: Target and step; None keeps the coefficient constant.
    """

    def __init__(self, initial: float, config: AdaptiveEntropy | None) -> None:
        """Start at the initial coefficient."""
        self._config, self._coefficient, self._acts = config, initial, True

    @property
    def value(self) -> float:
        """What multiplies the entropy now."""
        return self._coefficient if self._acts else 0.0

    def update(self, entropy: float) -> None:
        """Move by one step.

        Args:
            entropy: Mean of the last update, nats per action.

        Raises:
            TrainingError: It is not finite.

        >>> coefficient = EntropyCoefficient(0.0, AdaptiveEntropy(target=0.5, step=0.25))
        >>> coefficient.update(0.4); coefficient.value
        0.25
        >>> coefficient.update(0.6); coefficient.value
        0.0
        """
        if self._config is None:
            return
        if not math.isfinite(entropy):
            raise TrainingError("the measured entropy is not finite", where="entropy coefficient", got=entropy)
        step = self._config.step if entropy < self._config.target else -self._config.step
        self._coefficient = max(0.0, self._coefficient + step)
        self._acts = entropy <= self._config.target

    def state_dict(self) -> dict[str, float | bool]:
        """What a checkpoint keeps."""
        return {"coefficient": self._coefficient, "acts": self._acts}

    def load_state_dict(self, state: dict[str, float | bool]) -> None:
        """Go on from a checkpoint."""
        self._coefficient, self._acts = float(state["coefficient"]), bool(state["acts"])
