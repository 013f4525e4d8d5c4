"""Policy steps of bounded KL divergence: natural gradient, TRPO, and TRPO as a penalty with dual ascent.

All three make the surrogate `L(theta) = mean(pi_theta(a|s) / pi_old(a|s) A)` grow while
`mean over states of KL(pi_old || pi_theta) <= max_kl`, and differ in how they hold the constraint. The old policy comes
first in the KL: the states and actions are its own. Advantages, ratios, the surrogate, the critic's loss, the dual
variable and the loop are the shared core's; the critic takes minibatch steps of its own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal, assert_never

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from classic_rl.divergence import Described, describe, kl_from
from classic_rl.natural_gradient import FisherProduct, NaturalStep, actor_parameters, natural_step
from classic_rl.policy import ActorCritic
from rlhf.config import Config
from rlhf.core.algorithm import AlgorithmConfig, DualKl, Gae, KlInLoss, NoKl, SquaredValueLoss, Unclipped
from rlhf.core.objective import Objective
from rlhf.core.types import Experience, PolicyOutput
from rlhf.errors import ConfigError, TrainingError
from rlhf.training.distributed import make_accelerator, make_reduce
from rlhf.training.learner import Learner
from rlhf.training.optimizer import PolicyOptimizer, build_optimizer
from rlhf.training.preparation import load_policy_state, policy_state
from rlhf.training.tally import measure_experience
from rlhf.training.update_config import UpdateConfig


class CriticUpdate(Config):
    """The critic's own regression on the returns of each rollout, by Adam."""

    learning_rate: float = Field(1e-3, gt=0)
    """Of Adam."""
    epochs: int = Field(10, ge=1)
    """Passes over the rollout."""
    minibatches: int = Field(16, ge=1)
    """Steps per pass."""


class NaturalGradient(Config):
    """One step `sqrt(2 max_kl / (g^T F^-1 g)) F^-1 g`, taken as it is (Kakade 2001)."""

    type: Literal["natural_gradient"] = "natural_gradient"
    advantages: Gae = Gae(standardize="batch")
    max_kl: float = Field(0.01, gt=0)
    """Mean KL(old || new) of the step to second order, nats; the measured one may differ."""
    conjugate_gradient_iterations: int = Field(15, ge=1)
    """Fisher-vector products spent on F^-1 g."""
    damping: float = Field(0.1, ge=0)
    """Added to the diagonal of the Fisher information."""
    critic: CriticUpdate = CriticUpdate()


class Trpo(Config):
    """The natural step, shrunk until it keeps the constraint and improves the surrogate (Schulman et al. 2015)."""

    type: Literal["trpo"] = "trpo"
    advantages: Gae = Gae(standardize="batch")
    max_kl: float = Field(0.01, gt=0)
    """Bound of the mean KL(old || new) over the rollout's states, nats; never exceeded."""
    conjugate_gradient_iterations: int = Field(15, ge=1)
    """Fisher-vector products spent on F^-1 g."""
    damping: float = Field(0.1, ge=0)
    """Added to the diagonal of the Fisher information."""
    shrink: float = Field(0.8, gt=0, lt=1)
    """Each try of the line search takes this times the step before."""
    max_tries: int = Field(10, ge=1)
    """Tries of the line search; when none passes, the old policy stays."""
    critic: CriticUpdate = CriticUpdate()


class TrpoDual(Config):
    """Gradient ascent on `L - multiplier (KL - max_kl)`, and on the multiplier from update to update.

    After each update `multiplier <- max(0, multiplier + dual_learning_rate (KL - max_kl))` with the KL measured then;
    without the projection on 0, a small KL would come to be *punished*.
    """

    type: Literal["trpo_dual"] = "trpo_dual"
    advantages: Gae = Gae(standardize="batch")
    max_kl: float = Field(0.01, gt=0)
    """Mean KL(old || new) over the rollout's states that the multiplier steers to, nats; an update may exceed it."""
    learning_rate: float = Field(3e-4, gt=0)
    """Of Adam on the actor."""
    steps: int = Field(20, ge=1)
    """Adam's steps per rollout, each on the whole of it."""
    initial_multiplier: float = Field(1.0, ge=0)
    """Before the first update."""
    dual_learning_rate: float = Field(50.0, gt=0)
    """The multiplier's change per nat of excess; KL errors are of the order of max_kl, hence a large number."""
    critic: CriticUpdate = CriticUpdate()


TrustRegion = Annotated[NaturalGradient | Trpo | TrpoDual, Field(discriminator="type")]


def shared_algorithm(config: TrustRegion) -> AlgorithmConfig:
    """Express what the shared core does of it: advantages, surrogate, dual variable, the critic's loss and passes."""
    kl = NoKl()
    if isinstance(config, TrpoDual):
        coefficient = DualKl(
            initial=config.initial_multiplier, target=config.max_kl, learning_rate=config.dual_learning_rate
        )
        kl = KlInLoss(estimator="k3", against="old_policy", coefficient=coefficient)
    return AlgorithmConfig(
        advantages=config.advantages,
        surrogate=Unclipped(),
        kl=kl,
        value_loss=SquaredValueLoss(coefficient=1.0),
        epochs=config.critic.epochs,
        minibatches=config.critic.minibatches,
    )


class TrustRegionLearner:
    """What `optimize_policy` drives: one bounded policy step and the critic's regression per rollout.

    Attributes:
        policy: What learns; collectors read it.
        algorithm: What of it the shared core does.
        reduce: Sums a tensor over processes.
        replicated: Checkpoints need the state of one process only.
    """

    replicated = True

    def __init__(
        self,
        policy: ActorCritic,
        config: NaturalGradient | Trpo | TrpoDual,
        *,
        accelerator: Accelerator | None = None,
        seed: int = 0,
    ) -> None:
        """Put the policy on its device.

        Raises:
            ConfigError: No critic, or an actor or action distribution without closed forms.
        """
        if policy.critic is None:
            raise ConfigError(
                "trust regions need advantages from a critic", where="policy", remedy="Build it with critic=True."
            )
        self.accelerator = accelerator if accelerator is not None else make_accelerator()
        self.policy, self.config = policy.to(self.accelerator.device), config
        self.algorithm, self.reduce = shared_algorithm(config), make_reduce(self.accelerator)
        self._objective = Objective(self.algorithm)
        self._parameters = actor_parameters(policy)
        self._critic = Learner(
            _CriticOnly(policy.critic),
            self.algorithm.model_copy(update={"kl": NoKl()}),
            UpdateConfig(
                learning_rate=config.critic.learning_rate, optimizer="adam", max_grad_norm=None, flatten_parameters=True
            ),
            accelerator=self.accelerator,
            seed=seed,
        )
        self._optimizer = _adam(self._parameters, config.learning_rate) if isinstance(config, TrpoDual) else None
        self.updates = 0

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
            experience: The rows of this process, as `estimate` made them with `self.algorithm`.
            kl_coef: The multiplier of trpo_dual.
            progress: Share of the run that is done; nothing here is scheduled.
            progress_step: Likewise.
            critic_only: Leave the policy as it is.

        Returns:
            "kl_to_old_after": mean KL(old || new), exact per state, nats. "surrogate_gain": L(new) - L(old).
            "step_accepted" 0 or 1, "line_search_tries", "cg_residual", "predicted_gain" where they exist. "entropy" of
            the old policy, "grad_norm", "value_loss", "explained_variance", "rows", "actions", "kl_coef".

        Raises:
            TrainingError: A gradient or a loss that is not finite; the weights stay as they were.
            ConfigError: A network with convolutions or a memory, or masks of valid actions.
        """
        self.policy.require_plain(experience.inputs)
        facts = measure_experience(experience, reduce=self.reduce)
        batch = experience.to(self.accelerator.device).flatten_actions()
        metrics = {} if critic_only else self._improve(batch, actions=facts["actions"], multiplier=kl_coef)
        zeros = torch.zeros_like(batch.advantages)
        critic = self._critic.update(replace(batch, advantages=zeros, old_log_probs=zeros))
        self.updates += 1
        return facts | metrics | {"value_loss": critic["value_loss"], "kl_coef": kl_coef}

    def _improve(self, batch: Experience, *, actions: float, multiplier: float) -> dict[str, float]:
        surrogate = _Surrogate(self, batch, actions=actions)
        loss, entropy = surrogate.loss()
        gradient = -self._gradient(loss)
        before, norm = -self.reduce(loss.detach()).item(), float(torch.linalg.vector_norm(gradient))
        if not math.isfinite(norm + before):
            raise TrainingError(
                "the surrogate's gradient is not finite", where=f"update {self.updates + 1}", got=f"norm {norm}"
            )
        match self.config:
            case TrpoDual():
                details = self._penalised_ascent(surrogate, multiplier)
            case NaturalGradient() | Trpo():
                details = self._natural_ascent(surrogate, gradient, before)
            case _:
                assert_never(self.config)
        after, kl = surrogate.measure()
        return {
            "kl_to_old_after": kl,
            "surrogate_gain": after - before,
            "entropy": entropy,
            "grad_norm": norm,
            **details,
        }

    # --- natural gradient and TRPO ----------------------------------------------------------------------------------

    def _natural_ascent(self, surrogate: _Surrogate, gradient: Tensor, before: float) -> dict[str, float]:
        config = self.config
        assert not isinstance(config, TrpoDual)
        observations = surrogate.batch.inputs["observations"].flatten(0, 1)
        product = FisherProduct(self.policy, observations, damping=config.damping, reduce=self.reduce)
        step = natural_step(product, gradient, max_kl=config.max_kl, iterations=config.conjugate_gradient_iterations)
        if step is None:
            return {"step_accepted": 0.0}
        details = {"cg_residual": step.residual, "predicted_gain": step.predicted_gain}
        if isinstance(config, Trpo):
            return details | self._line_search(surrogate, step, before, config)
        _set_vector(self._parameters, _vector(self._parameters) + step.step)
        return details | {"step_accepted": 1.0}

    def _line_search(self, surrogate: _Surrogate, step: NaturalStep, before: float, config: Trpo) -> dict[str, float]:
        """Take the longest of step, shrink x step, shrink^2 x step, ... that improves inside the region; or none."""
        start = _vector(self._parameters)
        for tries in range(1, config.max_tries + 1):
            _set_vector(self._parameters, start + config.shrink ** (tries - 1) * step.step)
            value, kl = surrogate.measure()
            if value > before and kl <= config.max_kl:  # False where one of them is NaN
                return {"step_accepted": 1.0, "line_search_tries": float(tries)}
        _set_vector(self._parameters, start)
        return {"step_accepted": 0.0, "line_search_tries": float(config.max_tries)}

    # --- penalty and dual ascent ------------------------------------------------------------------------------------

    def _penalised_ascent(self, surrogate: _Surrogate, multiplier: float) -> dict[str, float]:
        assert isinstance(self.config, TrpoDual)
        assert self._optimizer is not None
        start = _vector(self._parameters)
        for _ in range(self.config.steps):
            gradient = self._gradient(surrogate.loss(multiplier)[0])
            norm = float(torch.linalg.vector_norm(gradient))
            if not math.isfinite(norm):
                _set_vector(self._parameters, start)
                raise TrainingError("the penalised surrogate's gradient is not finite", got=f"norm {norm}")
            for parameter, piece in zip(self._parameters, _pieces(self._parameters, gradient), strict=True):
                parameter.grad = piece.clone()
            self._optimizer.step(norm=norm, max_norm=None)
        self._optimizer.zero_grad()
        return {"step_accepted": 1.0}

    def _gradient(self, loss: Tensor) -> Tensor:
        """[D] of the actor's weights, summed over processes."""
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        return self.reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]))

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "policy": policy_state(self.policy),
            "critic": self._critic.state_dict(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ConfigError: The state belongs to another policy or algorithm.
        """
        if (state["optimizer"] is None) != (self._optimizer is None):
            raise ConfigError(
                "the checkpoint was made by another algorithm.type",
                where="resume",
                remedy="Resume with the config that the run was started with.",
            )
        load_policy_state(self.policy, state["policy"])
        self._critic.load_state_dict(state["critic"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


class _Surrogate:
    """The surrogate and the KL of one rollout, as functions of the policy's current weights."""

    def __init__(self, learner: TrustRegionLearner, batch: Experience, *, actions: float) -> None:
        self.learner, self.batch, self.actions = learner, batch, actions
        with torch.no_grad():
            self.old: Described = describe(learner.policy.distribution, self._outputs())

    def _outputs(self) -> Tensor:
        return self.learner.policy.actor(self.batch.inputs["observations"])

    def loss(self, multiplier: float = 0.0) -> tuple[Tensor, float]:
        """This process's share of `-L + multiplier mean KL`, and the mean entropy over all processes."""
        outputs = self._outputs()
        loss, entropy = self._share(outputs)
        if multiplier:
            kl = kl_from(self.old, self.learner.policy.distribution, outputs)
            loss = loss + multiplier * kl.sum() / self.actions
        return loss, self.learner.reduce(entropy).item()

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """L and the mean KL(old || current), over all processes."""
        outputs = self._outputs()
        kl = kl_from(self.old, self.learner.policy.distribution, outputs).sum() / self.actions
        surrogate, divergence = self.learner.reduce(torch.stack([-self._share(outputs)[0], kl])).tolist()
        return surrogate, divergence

    def _share(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Through the shared objective; its value part plays no role, so the old values stand in."""
        log_probs, entropy = self.learner.policy.distribution.log_probs_and_entropy(outputs, self.batch.actions)
        sums = self.learner._objective(PolicyOutput(log_probs, entropy, self.batch.old_values), self.batch)
        return sums.policy / self.actions, entropy.detach().sum() / self.actions


class _CriticOnly(nn.Module):
    """A policy that only predicts values, for a learner that only trains them: advantages are 0 there."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, inputs: dict[str, Tensor], actions: Tensor) -> PolicyOutput:
        values = self.critic(inputs["observations"]).squeeze(-1)
        zeros = torch.zeros_like(values)
        return PolicyOutput(zeros, zeros, values)


def _adam(parameters: list[nn.Parameter], learning_rate: float) -> PolicyOptimizer:
    update = UpdateConfig(learning_rate=learning_rate, optimizer="adam")
    named = [(f"actor.{index}", parameter) for index, parameter in enumerate(parameters)]
    return PolicyOptimizer(build_optimizer(parameters, update), named_parameters=named)


def _vector(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


def _pieces(parameters: list[nn.Parameter], vector: Tensor) -> list[Tensor]:
    split = vector.split([parameter.numel() for parameter in parameters])
    return [piece.view_as(parameter) for piece, parameter in zip(split, parameters, strict=True)]


@torch.no_grad()
def _set_vector(parameters: list[nn.Parameter], vector: Tensor) -> None:
    """Write in place: the collector's mirror looks at this memory."""
    for parameter, piece in zip(parameters, _pieces(parameters, vector), strict=True):
        parameter.copy_(piece)
