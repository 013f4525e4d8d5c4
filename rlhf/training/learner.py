"""The learner: one experience in, moved weights and measured numbers out. Gym and language models alike."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.core.algorithm import AlgorithmConfig, FixedKl, KlInLoss
from rlhf.core.entropy import EntropyCoefficient
from rlhf.core.estimate import standardize_advantages
from rlhf.core.masking import masked_sum
from rlhf.core.objective import LossSums, Objective, SurrogateFunction
from rlhf.core.types import Experience, PolicyOutput, present
from rlhf.training import schedules
from rlhf.training.batching import (
    Epoch,
    MicrobatchLimits,
    Minibatch,
    Shard,
    clear_masked,
    make_shard,
    microbatches,
    plan_epochs,
    rows_between,
    split_rows,
    standardize_minibatches,
)
from rlhf.training.diagnosis import non_finite_error
from rlhf.training.distributed import make_accelerator, make_reduce, refuse_unsupported
from rlhf.training.kept_forward import let_go, pass_on, take_over
from rlhf.training.mixing import MixedLoss
from rlhf.training.preparation import (
    critic_names,
    load_policy_state,
    policy_state,
    prepare_policy,
    refuse_contradictions,
    refuse_dropout,
)
from rlhf.training.recording import RecordedLoss, can_record
from rlhf.training.tally import Tally, measure_experience
from rlhf.training.update_config import UpdateConfig

EARLY_STOP_FACTOR = 1.5  # as in OpenAI's spinning up and Stable-Baselines3


class Learner:
    """Epochs x minibatches x microbatches over one experience.

    The gradient of a minibatch does not depend on how it is cut into microbatches or spread over processes: losses are
    sums, divided by counts over the whole minibatch of all processes. A step whose loss or gradient is not finite is
    refused before it touches the weights.

    Attributes:
        policy: The module itself, not wrapped: for collectors and for saving.
        algorithm: What the loss is.
        objective: The loss.
        reduce: Sums a tensor over processes; give it to `estimate`.
        updates: Updates made so far.
        replicated: Checkpoints need the state of one process only.
    """

    replicated = True

    def __init__(
        self,
        policy: nn.Module,
        algorithm: AlgorithmConfig,
        update: UpdateConfig,
        *,
        accelerator: Accelerator | None = None,
        seed: int = 0,
        surrogate: SurrogateFunction | None = None,
        mixed: MixedLoss | None = None,
    ) -> None:
        """Put the policy on its device and build its optimizer.

        Args:
            policy: Called as `policy(inputs, actions) -> PolicyOutput`. It may offer
                `row_lengths(inputs, action_mask) -> [B]`, the tokens it must process per row; rows are then sorted by
                them inside a minibatch.
            algorithm: What the loss is.
            update: How the weights move.
            accelerator: None makes one.
            seed: Of the permutations; the same on all processes.
            surrogate: A callable that replaces the algorithm's surrogate.
            mixed: A loss on other data, added to every minibatch's.

        Raises:
            ConfigError: Settings that contradict each other.
            ModelError: A policy with dropout or without trainable parameters.
        """
        self.accelerator = accelerator if accelerator is not None else make_accelerator()
        refuse_unsupported(self.accelerator)
        refuse_contradictions(algorithm, update, policy)
        refuse_dropout(policy)
        self.policy, self.algorithm, self.config = policy, algorithm, update
        self.objective = Objective(algorithm, surrogate=surrogate)
        self.entropy_coef = EntropyCoefficient(algorithm.entropy_coef, algorithm.adaptive_entropy)
        self.reduce = make_reduce(self.accelerator)
        self.mixed = mixed
        self.updates = 0
        self._only: set[str] | None = None
        self._mismatch = torch.zeros(())
        self._generator = torch.Generator().manual_seed(seed)
        self._limits = MicrobatchLimits(rows=update.microbatch_rows, tokens=update.microbatch_tokens)
        self._standardizes = getattr(algorithm.advantages, "standardize", "none") == "minibatch"
        self._model, self._optimizer = prepare_policy(policy, update, self.accelerator)
        self._records = self._optimizer.flat is not None and can_record(algorithm, update, self.accelerator)
        self._recorded: RecordedLoss | None = None
        # DDP and FSDP average gradients over processes; our denominators are global already.
        self._averages = self.accelerator.num_processes > 1 and self._optimizer.flat is None

    def update(
        self,
        experience: Experience,
        *,
        kl_coef: float = 0.0,
        progress: float = 0.0,
        progress_step: float = 0.0,
        critic_only: bool = False,
    ) -> dict[str, float]:
        """Learn from one experience.

        Args:
            experience: The rows of this process, as `estimate` made them.
            kl_coef: Coefficient of a KL term in the loss.
            progress: Share of the run that is done, in [0, 1]; drives the schedules.
            progress_step: Share of the run that this update is; warm-up reads it.
            critic_only: Train only what `policy.critic_parameters()` names, by the value loss alone.

        Returns:
            Means over all actions and steps: the objective's metrics, "grad_norm", "learning_rate", "kl_coef",
            "epochs_run" (less than `algorithm.epochs` after an early stop), "rows", "actions"; "explained_variance"
            with a critic; "kl_to_ref" and "kl_to_ref_per_sequence" with a reference. "approx_kl" and "kl_to_old" are
            of the last epoch; kl_to_ref is of the policy that collected. "sampling_mismatch_mean" where the step gives
            the old log-probs: |their difference to the engine's|.

        Raises:
            TrainingError: A loss or gradient that is not finite; the weights stay as before that step.
            ConfigError: `critic_only` with a policy whose critic cannot be trained alone.
        """
        self._only = critic_names(self.policy, flat=self._optimizer.flat is not None) if critic_only else None
        rate = schedules.learning_rate(self.config, progress=progress, progress_step=progress_step)
        scale = schedules.clip_scale(self.config, progress=progress)
        self._optimizer.set_learning_rate(rate)
        if not self._model.training:  # it visits every submodule
            self._model.train()
        if self._optimizer.flat is not None:
            self._optimizer.flat.require_connected()
        experience = _on_device(experience, self.accelerator.device)
        facts = measure_experience(experience, reduce=self.reduce)
        if self.config.shuffle == "actions":
            experience = experience.flatten_actions()
        else:
            experience = clear_masked(experience)
        self._mismatch = torch.zeros((), device=self.accelerator.device)
        tally = Tally(self.objective.metric_names, minibatches=self.algorithm.minibatches)
        last = self._run_epochs(experience, tally, kl_coef=kl_coef, clip_scale=scale)
        self.updates += 1
        metrics = tally.metrics() | facts | {"learning_rate": rate, "kl_coef": kl_coef}
        if experience.on_policy:
            metrics["sampling_mismatch_mean"] = self.reduce(self._mismatch).item() / max(1.0, facts["actions"])
        if self.mixed is not None:
            metrics |= self.mixed.metrics()
        if self.algorithm.adaptive_entropy is not None:
            metrics["entropy_coef"] = self.entropy_coef.value
            self.entropy_coef.update(metrics["entropy"])
        if _steers_by_kl_to_old(self.algorithm):
            after = self._kl_to_old_after(*last)
            metrics["kl_to_old_after"] = after
            metrics["kl_to_old_after_per_sequence"] = after * facts["actions"] / facts["rows"]
        return metrics

    def _run_epochs(
        self, experience: Experience, tally: Tally, *, kl_coef: float, clip_scale: float
    ) -> tuple[Experience, Epoch]:
        """All optimizer steps; returns the last epoch's rows in their order, and its plan."""
        minibatches = self.algorithm.minibatches
        shard = make_shard(self.accelerator, len(experience), minibatches=minibatches)
        if self._standardizes and minibatches == 1:  # the minibatch is the whole: once is enough for all epochs
            experience = standardize_advantages(experience, reduce=self.reduce)
        for epoch, plan in enumerate(self._plan(experience, shard)):
            rows = experience if plan.order is None else experience.select(plan.order.to(experience.actions.device))
            if self._standardizes and minibatches > 1:
                rows = standardize_minibatches(rows, plan, reduce=self.reduce)
            rows, live = take_over(rows, minibatches=minibatches)
            if live:
                experience = let_go(experience)
            tally.start_epoch()
            parts = split_rows(rows, [minibatch.stop - minibatch.start for minibatch in plan.minibatches])
            for index, (minibatch, own) in enumerate(zip(plan.minibatches, parts, strict=True)):
                if minibatch.actions == 0:
                    tally.skip()  # nothing to learn from, yet Adam's momentum would move the weights
                    continue
                sums = self._backward(own, minibatch, filler_from=rows, kl_coef=kl_coef, clip_scale=clip_scale)
                pass_on(live, rows)
                measured = self._measure(sums)
                norm = self._optimizer.gradient_norm()
                if not math.isfinite(norm + measured[-1] + measured[-2]):
                    self._refuse(own, measured, norm, minibatch, epoch=epoch, index=index)
                tally.add(measured[:-2], norm=norm, actions=minibatch.actions)
                if self._drifted(measured, minibatch.actions):
                    self._optimizer.zero_grad()
                    return rows, plan
                self._optimizer.step(norm=norm, max_norm=self.config.max_grad_norm)
                tally.step()
        return rows, plan

    def _plan(self, experience: Experience, shard: Shard) -> list[Epoch]:
        return plan_epochs(
            experience,
            shard,
            accelerator=self.accelerator,
            generator=self._generator,
            epochs=self.algorithm.epochs,
            minibatches=self.algorithm.minibatches,
            limits=self._limits,
            lengths=self._lengths(experience),
            denominators=self.objective.denominators,
        )

    def _lengths(self, experience: Experience) -> Tensor | None:
        """[B] tokens per row on the CPU, where sorting by them can pay."""
        row_lengths = getattr(self.policy, "row_lengths", None)
        if row_lengths is None or self._limits == MicrobatchLimits():
            return None
        return row_lengths(experience.inputs, experience.action_mask).cpu()

    def _backward(
        self, own: Experience, minibatch: Minibatch, *, filler_from: Experience, kl_coef: float, clip_scale: float
    ) -> LossSums:
        """Leave the gradient of the whole minibatch; returns this process's sums, detached."""
        self._optimizer.zero_grad()
        totals: LossSums | None = None
        mixes = self.mixed is not None and self._only is None
        settings = {
            "kl_coef": kl_coef if isinstance(self.algorithm.kl, KlInLoss) else 0.0,
            "clip_scale": clip_scale,
            "entropy_coef": self.entropy_coef.value,
        }
        for rows, is_last in microbatches(own, minibatch, filler_from=filler_from):
            sums = self._by_hand(rows, minibatch, settings)
            if sums is None:
                with self._sync(is_last and not mixes):
                    sums = self._by_autograd(rows, minibatch, settings)
            totals = sums if totals is None else _added(totals, sums)
        if mixes:
            self._backward_mixed()
        if self._optimizer.flat is not None and self.accelerator.num_processes > 1:
            self._optimizer.sum_over_processes()
        if self._only is not None:
            self._optimizer.drop_gradients(kept=self._only)
        assert totals is not None
        return totals

    def _by_autograd(self, rows: Experience, minibatch: Minibatch, settings: dict[str, float]) -> LossSums:
        """Add a microbatch's gradient; its loss sums, detached."""
        output = self._score(rows)
        if rows.on_policy:
            self._mismatch += masked_sum((output.log_probs.detach() - rows.old_log_probs).abs(), rows.counted)
        recorded = self._recorded_for(rows, settings)
        found = None if recorded is None else recorded(output, rows, minibatch.denominators)
        if found is not None:
            sums, slopes = found
            reached = [(x, g) for x, g in zip(output, slopes, strict=True) if x is not None and g is not None]
            torch.autograd.backward([x for x, _ in reached], [g for _, g in reached])
            return sums
        sums = self.objective(output, rows, **settings)
        learned = sums if self._only is None else sums._replace(policy=0.0 * sums.policy)
        loss = self.objective.loss(learned, minibatch.denominators)
        if self._averages:
            loss = _reach_every_output(loss, output) * self.accelerator.num_processes
        loss.backward()
        return LossSums(sums.policy.detach(), sums.value.detach(), sums.metrics)

    def _score(self, rows: Experience) -> PolicyOutput:
        if rows.live_log_probs is not None:
            return PolicyOutput(rows.live_log_probs, present(rows.live_entropy), rows.live_values)
        if rows.live_values is None:
            return self._model(rows.inputs, rows.actions)
        return self._model(rows.inputs, rows.actions, with_values=False)._replace(values=rows.live_values)

    def _by_hand(self, rows: Experience, minibatch: Minibatch, settings: dict[str, float]) -> LossSums | None:
        """Add a microbatch's gradient without torch's operations; None where autograd has to do it.

        The loss must have been recorded, and the policy offer `by_hand(inputs, actions)`.
        """
        recorded = self._recorded_for(rows, settings)
        if recorded is None or not recorded.ready(len(rows)) or not hasattr(self.policy, "by_hand"):
            return None
        scored = self.policy.by_hand(rows.inputs, rows.actions)  # type: ignore[operator]
        if scored is None:
            return None
        output, backward = scored
        found = recorded(output, rows, minibatch.denominators)
        assert found is not None, "a loss that was recorded can be replayed"
        sums, slopes = found
        assert self._optimizer.flat is not None
        self._optimizer.flat.gradient.add_(backward(slopes))
        return sums

    def _recorded_for(self, rows: Experience, settings: dict[str, float]) -> RecordedLoss | None:
        """The loss under these settings as it is recorded; None where it may not be."""
        if not (rows.complete and self._records):
            return None
        if self._recorded is None or self._recorded.settings != settings:
            self._recorded = RecordedLoss(self.objective, settings)
        return self._recorded

    def _backward_mixed(self) -> None:
        """Add the gradient of the mixed loss; its denominators are global already, like the objective's."""
        assert self.mixed is not None
        parts = self.mixed.minibatch()
        for index, part in enumerate(parts):
            with self._sync(index + 1 == len(parts)):
                output = self._model(part.inputs, part.actions, temperature=1.0)
                loss = -part.weight * masked_sum(output.log_probs, part.action_mask)
                self.mixed.record(loss.detach())
                if self._averages:
                    loss = _reach_every_output(loss, output) * self.accelerator.num_processes
                loss.backward()

    def _sync(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over processes in the last backward of a minibatch only."""
        return self.accelerator.no_sync(self._model) if self._averages and not last else nullcontext()

    def _measure(self, sums: LossSums) -> list[float]:
        """Metric sums over all processes, then the policy's and the value's loss sum: the minibatch's one wait."""
        return self.reduce(torch.cat([sums.metrics, torch.stack([sums.policy, sums.value])])).tolist()

    def _drifted(self, measured: list[float], actions: int) -> bool:
        if self.config.target_kl is None:
            return False
        approx_kl = measured[self.objective.metric_names.index("approx_kl")] / actions
        return approx_kl > EARLY_STOP_FACTOR * self.config.target_kl

    def _refuse(
        self, own: Experience, measured: list[float], norm: float, minibatch: Minibatch, *, epoch: int, index: int
    ) -> None:
        where = f"update {self.updates + 1}, epoch {epoch + 1}, minibatch {index + 1}"
        policy_divisor, value_divisor = minibatch.denominators.clamp(min=1).tolist()
        error = non_finite_error(
            where=where,
            policy_loss=measured[-2] / policy_divisor,
            value_loss=measured[-1] / value_divisor,
            norm=norm,
            policy=self.policy,
            experience=own,
        )
        self._optimizer.zero_grad()
        raise error

    @torch.no_grad()
    def _kl_to_old_after(self, rows: Experience, plan: Epoch) -> float:
        """Mean KL(old || policy) per action after the last step, where PPO's section 4 measures it; k3, nats.

        During the update it is 0 at the first minibatch, so its mean over steps would tell too little.
        """
        index = self.objective.metric_names.index("approx_kl")
        total = torch.zeros((), device=rows.actions.device)
        for minibatch in plan.minibatches:
            own = rows_between(rows, minibatch.start, minibatch.stop)
            for part, _ in microbatches(own, minibatch, filler_from=rows):
                total += self.objective(self._model(part.inputs, part.actions), part).metrics[index]
        actions = sum(minibatch.actions for minibatch in plan.minibatches)
        return self.reduce(total).item() / max(1, actions)

    @torch.no_grad()
    def score(self, inputs: dict[str, Tensor], actions: Tensor) -> PolicyOutput:
        """What an update's forward says of these actions: the wrapped policy, in training mode and precision."""
        self._model.train()
        device = self.accelerator.device
        return self._model({name: tensor.to(device) for name, tensor in inputs.items()}, actions.to(device))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, per parameter name; a collective call where parameters are sharded."""
        return {
            "policy": policy_state(self.policy),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "updates": self.updates,
            "entropy_coef": self.entropy_coef.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ConfigError: The state belongs to another policy.
        """
        load_policy_state(self.policy, state["policy"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        self.updates = state["updates"]
        self.entropy_coef.load_state_dict(state["entropy_coef"])


def _on_device(experience: Experience, device: torch.device) -> Experience:
    return experience if experience.actions.device == device else experience.to(device)


def _added(one: LossSums, other: LossSums) -> LossSums:
    return LossSums(*(a + b for a, b in zip(one, other, strict=True)))


def _reach_every_output(loss: Tensor, output: PolicyOutput) -> Tensor:
    """Tie outputs that the objective does not use to the loss: DDP waits for the gradient of every parameter."""
    unused = output.entropy.sum() if output.values is None else output.entropy.sum() + output.values.sum()
    return loss + 0.0 * unused


def _steers_by_kl_to_old(algorithm: AlgorithmConfig) -> bool:
    kl = algorithm.kl
    return isinstance(kl, KlInLoss) and kl.against == "old_policy" and not isinstance(kl.coefficient, FixedKl)
