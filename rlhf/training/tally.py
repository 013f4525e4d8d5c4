"""Numbers gathered during an update."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.core.masking import Reduce, masked_sum
from rlhf.core.types import Experience

LAST_EPOCH_METRICS = ("approx_kl", "kl_to_old")
"""How far the policy has moved is a question about the end of the update, not its average."""


class Tally:
    """Sums of metrics over the minibatches of one update, in python floats (float64).

    Args:
        names: Of the metric sums that `add` receives.
        minibatches: Steps per epoch.
    """

    def __init__(self, names: Sequence[str], *, minibatches: int) -> None:
        """Start empty."""
        self._names, self._minibatches = tuple(names), minibatches
        self._sums, self._epoch_sums = [0.0] * len(names), [0.0] * len(names)
        self._actions = self._epoch_actions = self._norms = 0.0
        self._measured = self._steps = self._skipped = 0

    def start_epoch(self) -> None:
        """Begin the sums that are reported of the last epoch only."""
        self._epoch_sums, self._epoch_actions = [0.0] * len(self._names), 0.0

    def add(self, sums: Sequence[float], *, norm: float, actions: int) -> None:
        """Add one minibatch's sums over its actions, and the norm of its gradient."""
        self._sums = [total + value for total, value in zip(self._sums, sums, strict=True)]
        self._epoch_sums = [total + value for total, value in zip(self._epoch_sums, sums, strict=True)]
        self._actions += actions
        self._epoch_actions += actions
        self._norms += norm
        self._measured += 1

    def step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1

    def skip(self) -> None:
        """Count a minibatch in which every action is masked."""
        self._skipped += 1

    def metrics(self) -> dict[str, float]:
        """Means per action, of the gradient norm per minibatch; "epochs_run" in steps / minibatches."""
        means = {name: total / max(1.0, self._actions) for name, total in zip(self._names, self._sums, strict=True)}
        for name, total in zip(self._names, self._epoch_sums, strict=True):
            if name in LAST_EPOCH_METRICS:
                means[name] = total / max(1.0, self._epoch_actions)
        means["grad_norm"] = self._norms / max(1, self._measured)
        means["epochs_run"] = self._steps / self._minibatches
        if self._skipped:
            means["minibatches_skipped"] = float(self._skipped)
        return means


@torch.no_grad()
def measure_experience(experience: Experience, *, reduce: Reduce) -> dict[str, float]:
    """Return facts about an experience of all processes, in one reduction.

    Args:
        experience: The rows of this process, not flattened.
        reduce: Sums a tensor over processes.

    Returns:
        "rows", "actions"; "explained_variance" (1 - Var[returns - values] / Var[returns]; nan where returns are
        constant) with a critic; "kl_to_ref" per action and "kl_to_ref_per_sequence" with a reference: k1 of the policy
        that collected, whose own samples these are, hence unbiased.
    """
    mask = experience.action_mask
    parts = [torch.tensor(float(mask.shape[0]), dtype=torch.float64, device=mask.device), mask.sum()]
    if experience.ref_log_probs is not None:
        parts.append(masked_sum((experience.old_log_probs - experience.ref_log_probs).double(), mask))
    if experience.returns is not None and experience.old_values is not None:
        returns = experience.returns.double()
        errors = returns - experience.old_values
        parts += [masked_sum(x, mask) for x in (returns, returns**2, errors, errors**2)]
    totals = reduce(torch.stack([part.double() for part in parts])).tolist()
    rows, actions = totals[:2]
    facts = {"rows": rows, "actions": actions}
    rest = totals[2:]
    if experience.ref_log_probs is not None:
        facts["kl_to_ref"] = rest[0] / max(1.0, actions)
        facts["kl_to_ref_per_sequence"] = rest[0] / rows
        rest = rest[1:]
    if rest:
        facts["explained_variance"] = _explained(rest, actions)
    return facts


def _explained(sums: Sequence[float], actions: float) -> float:
    returns, squares, errors, squared_errors = (value / max(1.0, actions) for value in sums)
    variance = squares - returns**2
    return 1.0 - (squared_errors - errors**2) / variance if variance > 1e-12 else float("nan")
