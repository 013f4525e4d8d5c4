"""Watching a run: each way in which reinforcement learning of language models is known to go wrong, told once.

A warning says what was seen and what to do, on the console, and in the metrics as `watch/warnings`, their count so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from rlhf.config import Config
from rlhf.core.types import Experience, Rollout

PATIENCE = 3
"""Iterations in a row after which a noisy measure is believed."""
NEGATIVE_KL = -0.01
"""Mean k1 per token below which samples and forward do not belong together: a KL is not negative."""


class WatchConfig(Config):
    """Warnings on the way, and a budget that ends the run."""

    enabled: bool = True
    """False stays silent; the budget counts in any case."""
    kl_budget: float | None = Field(None, gt=0)
    """End the run, in order, at the first rollout whose KL to the reference exceeds this many nats per sequence. The
    policy is saved as it was measured; where the algorithm needs no reference, one is kept for this."""
    kl_per_sequence: float = Field(25.0, gt=0)
    """Runaway KL: more nats per sequence than this, and ..."""
    kl_per_token: float = Field(0.25, gt=0)
    """... more nats per token than this."""
    entropy_floor: float = Field(0.1, ge=0, lt=1)
    """Collapse: below this share of the first iteration's entropy."""
    clip_fraction: float = Field(0.4, gt=0)
    """Share of clipped actions above which updates are too large; not for ratios per sequence, which clip by design."""
    critic_patience: int = Field(20, ge=1)
    """Iterations in a row with explained variance below 0 after which the critic does harm."""
    length_factor: float = Field(2.0, gt=1)
    """Drift: completions this many times longer, or shorter, than at first."""


class Watch:
    """An `Observer`, and a look at every evaluation.

    Args:
        config: Settings.
        say: Prints a sentence on the main process.
        clips_tokens: Whether the ratio, and hence the clip fraction, is one per token.
    """

    replicated = True
    """A checkpoint needs the state of one process only."""

    def __init__(self, config: WatchConfig, *, say: Callable[[str], None], clips_tokens: bool = True) -> None:
        """Nothing was seen yet."""
        self._config, self._say, self._clips_tokens = config, say, clips_tokens
        self._first: dict[str, float] = {}
        self._streaks: dict[str, int] = {}
        self._told: list[str] = []
        self._best_gold: dict[str, dict[str, float]] = {}

    def before_update(self, iteration: int, rollout: Rollout, experience: Experience) -> str | None:
        """End the run where the KL of this rollout exceeds the budget."""
        budget = self._config.kl_budget
        spent = rollout.metrics.get("rollout/kl_to_ref_per_sequence")
        if budget is None or spent is None or spent <= budget:
            return None
        return f"the KL to the reference, {spent:.3g} nats per sequence, exceeds the budget of {budget:g}"

    def after_update(self, iteration: int, metrics: dict[str, float]) -> dict[str, float]:
        """Look at an iteration."""
        if not self._config.enabled:
            return {}
        self._watch_kl(metrics, iteration)
        ratios = {
            "entropy_ratio": self._relative("entropy", metrics),
            "length_ratio": self._relative("rollout/length_mean", metrics),
        }
        self._watch_entropy(ratios["entropy_ratio"], iteration)
        self._watch_length(ratios["length_ratio"], iteration)
        self._watch_updates(metrics, iteration)
        told = {f"watch/{name}": ratio for name, ratio in ratios.items() if ratio is not None}
        return told | {"watch/warnings": float(len(self._told))}

    def _watch_kl(self, metrics: Mapping[str, float], iteration: int) -> None:
        token, sequence = metrics.get("kl_to_ref", 0.0), metrics.get("kl_to_ref_per_sequence", 0.0)
        if sequence > self._config.kl_per_sequence and token > self._config.kl_per_token:
            self._warn(
                "kl_runaway",
                f"the KL to the reference has run away: {sequence:.3g} nats per sequence, {token:.2g} per token",
                "raise the KL coefficient or make it adaptive (algorithm.kl.coefficient), lower update.learning_rate, "
                "or set watch.kl_budget",
                iteration,
            )
        if self._streak("negative_kl", token < NEGATIVE_KL) >= PATIENCE:
            self._warn(
                "negative_kl",
                f"the KL to the reference is negative, {token:.2g} nats per token, which a KL cannot be",
                "samples are not drawn from the policy that is measured: look at rollout/sampling_mismatch_mean, "
                "top_p and top_k, and the generator's weights",
                iteration,
            )

    def _watch_entropy(self, ratio: float | None, iteration: int) -> None:
        if ratio is not None and ratio < self._config.entropy_floor:
            self._warn(
                "entropy_collapse",
                f"the entropy has collapsed to {ratio:.0%} of the first iteration's: nothing new is tried any more",
                "raise surrogate.clip_high (clip-higher), the KL coefficient or entropy_coef, or lower the learning "
                "rate",
                iteration,
            )

    def _watch_length(self, ratio: float | None, iteration: int) -> None:
        factor = self._config.length_factor
        if ratio is not None and not 1 / factor <= ratio <= factor:
            self._warn(
                "length_drift",
                f"completions are {ratio:.2g} times as long as at first",
                "read samples.jsonl: if the reward pays for length, use shaping.length_penalty, "
                "shaping.overlong_buffer or shaping.missing_end_score",
                iteration,
            )

    def _watch_updates(self, metrics: Mapping[str, float], iteration: int) -> None:
        clipped = metrics.get("clip_fraction", 0.0)
        if self._clips_tokens and self._streak("clipping", clipped > self._config.clip_fraction) >= PATIENCE:
            self._warn(
                "clipping",
                f"{clipped:.0%} of actions are clipped: updates overshoot",
                "lower update.learning_rate or algorithm.epochs, or set update.target_kl",
                iteration,
            )
        explained = metrics.get("explained_variance", math.nan)
        if self._streak("critic", explained < 0) >= self._config.critic_patience:
            self._warn(
                "critic",
                f"the critic explains less than a constant would ({explained:.2g}) for "
                f"{self._config.critic_patience} iterations: its advantages are noise",
                "warm it up (critic.warmup_iterations), start it from the reward model, or raise "
                "value_loss.coefficient or clip_range",
                iteration,
            )

    def watching(self, evaluate: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
        """The same evaluation, looked at."""

        def watched() -> dict[str, float]:
            metrics = evaluate()
            if self._config.enabled:
                self.look_at_evaluation(metrics)
            return metrics

        return watched

    def look_at_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Compare the reward with the gold score: where one rises and the other falls, there is over-optimization.

        A fall is one of more than two standard errors below the best gold score so far (Gao et al. 2023,
        https://arxiv.org/abs/2210.10760, show the shape of that curve).
        """
        for kind in ("greedy", "sampled"):
            now = {name: metrics.get(f"{kind}_{name}", math.nan) for name in ("gold_mean", "score_mean")}
            now["error"] = metrics.get(f"{kind}_gold_standard_error", math.nan)
            if math.isnan(now["gold_mean"]) or math.isnan(now["score_mean"]):
                continue
            best = self._best_gold.get(kind)
            if best is None or now["gold_mean"] >= best["gold_mean"]:
                self._best_gold[kind] = now
                continue
            errors = [error for error in (now["error"], best["error"]) if not math.isnan(error)]
            fell = best["gold_mean"] - now["gold_mean"] > 2 * math.hypot(*errors)
            if fell and now["score_mean"] > best["score_mean"]:
                self._warn(
                    "overoptimization",
                    f"the reward rises ({best['score_mean']:.3g} to {now['score_mean']:.3g}) while the gold score "
                    f"falls ({best['gold_mean']:.3g} to {now['gold_mean']:.3g}): over-optimization",
                    "stop earlier (watch.kl_budget, run.best_metric), raise the KL coefficient, or use an ensemble of "
                    "reward models",
                    None,
                )

    def _relative(self, name: str, metrics: Mapping[str, float]) -> float | None:
        """A metric as a multiple of what it was in the first iteration."""
        value = metrics.get(name)
        if value is None:
            return None
        first = self._first.setdefault(name, value)
        return value / first if first > 0 else None

    def _streak(self, name: str, seen: bool) -> int:
        self._streaks[name] = self._streaks.get(name, 0) + 1 if seen else 0
        return self._streaks[name]

    def _warn(self, name: str, what: str, remedy: str, iteration: int | None) -> None:
        if name in self._told:
            return
        self._told.append(name)
        when = "" if iteration is None else f" (iteration {iteration})"
        self._say(f"watch{when}: {what}. Remedy: {remedy}.")

    @property
    def warnings(self) -> tuple[str, ...]:
        """Names of what was warned of, in order."""
        return tuple(self._told)

    def state_dict(self) -> dict[str, Any]:
        """What was seen and told."""
        return {
            "first": dict(self._first),
            "streaks": dict(self._streaks),
            "told": list(self._told),
            "best_gold": {kind: dict(best) for kind, best in self._best_gold.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._first, self._streaks = dict(state["first"]), dict(state["streaks"])
        self._told, self._best_gold = list(state["told"]), dict(state["best_gold"])
