"""Deep Q learning with every later piece as a switch: Double, dueling, prioritized, n-step, C51, QR, noisy, Rainbow.

    target  y = R + discount x Q(s', a'),  a' = argmax Q(s', .)      loss  1/2 w (y - Q(s, a))^2, y constant

Q(s', .) is the target network's (the online network's without one: the naive baseline). With Double DQN the online
network chooses a'. R and the discount come from the replay: n-step sums and gamma^n.

Slides and papers differ in places. The n-step target is at times printed with gamma for gamma^n, and with the online
network's values, where Rainbow takes the target network's; and "DQN" at times with Q_online(s', argmax Q_online), where
the paper takes the target network for both. Here it is as in the papers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from classic_rl.direct import DirectGradient
from classic_rl.distributional import (
    CategoricalValues,
    LossAndGradient,
    QuantileValues,
    ScalarValues,
    Values,
    categorical_loss,
    expected_values,
    outputs_per_action,
    project,
    quantile_loss,
    scalar_loss,
    support_of,
    taken,
)
from classic_rl.dqn_config import DQNConfig, HardTarget, SoftTarget, epsilon_at
from classic_rl.dqn_policy import GreedyQ, policy_description
from classic_rl.dqn_policy import load_policy as load_policy
from classic_rl.networks import NumpyMirror
from classic_rl.noisy import resample_noise
from classic_rl.off_policy import OffPolicySchedule, observation_form
from classic_rl.optimization import FlatNetwork
from classic_rl.prioritized import PrioritizedReplayBuffer
from classic_rl.q_networks import QNetwork
from classic_rl.replay import Transitions
from rlhf.errors import ConfigError


class DQN:
    """The agent of `classic_rl.off_policy.learn_off_policy`.

    Args:
        config: Which pieces.
        observation_space: Of one environment.
        action_space: Discrete.
        num_envs: Environments stepped together.
        schedule: The run's; exploration, learning rate and beta follow its steps.
        seed: Of weights, exploration, replay and noise.
        action_masks: Whether the environment tells valid actions; they are stored then.
        device: Where the networks live.

    Raises:
        ConfigError: Actions that are not Discrete, or a network that does not fit the observations.
    """

    def __init__(
        self,
        config: DQNConfig,
        *,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        num_envs: int,
        schedule: OffPolicySchedule,
        seed: int = 0,
        action_masks: bool = False,
        device: str = "cpu",
    ) -> None:
        if not isinstance(action_space, spaces.Discrete):
            raise ConfigError(
                "DQN chooses among finitely many actions",
                where="environment.id",
                got=str(action_space),
                expected="a Discrete action space",
                remedy="Take agent.type ddpg, td3 or sac for Box actions.",
            )
        self.config, self.schedule = config, schedule
        self.observation_space, self.action_space = observation_space, action_space
        self.num_actions, self.num_envs = int(action_space.n), num_envs
        self.device = torch.device(device)
        seeds = [int(value) for value in np.random.SeedSequence(seed).generate_state(4)]
        self.online = FlatNetwork(self._network(seeds[0]), config.optimizer)
        self.target = None if config.target.type == "none" else FlatNetwork(self._network(seeds[0]))
        self.direct = self.target_mirror = None
        if self.online.network.runs_in_numpy:
            self.direct = DirectGradient(self.online.network.plain)
            self.target_mirror = NumpyMirror((self.target or self.online).network.plain)
        self.policy = GreedyQ(self.online.network, observation_space, action_space, config.values)
        self.generator = np.random.default_rng(seeds[1])
        self.noise_generator = torch.Generator().manual_seed(seeds[2])
        shape, dtype = observation_form(observation_space)
        self.replay = config.replay.make(
            num_envs=num_envs,
            observation_shape=shape,
            observation_dtype=dtype,
            action_shape=(),
            action_dtype=np.int64,
            discount=config.discount,
            n_step=config.n_step,
            seed=seeds[3],
            clip_rewards=config.clip_rewards,
            num_actions=self.num_actions if action_masks else None,
        )
        self._synchronized = 0
        self._output_shape = (self.num_actions, outputs_per_action(config.values))

    def _network(self, seed: int) -> QNetwork:
        return QNetwork(
            self.observation_space,
            self.num_actions,
            size=outputs_per_action(self.config.values),
            config=self.config.network,
            seed=seed,
        ).to(self.device)

    # --- acting ---------------------------------------------------------------------------------------------------

    def epsilon(self, env_steps: int) -> float:
        """Share of random actions after `env_steps` steps; all of them are random before the first training."""
        if env_steps < self.schedule.start_steps:
            return 1.0
        return epsilon_at(self.config.exploration, env_steps, total_steps=self.schedule.total_steps)

    def act(self, observations: np.ndarray, *, env_steps: int, action_masks: np.ndarray | None = None) -> np.ndarray:
        """Epsilon-greedy actions [N]; random ones are drawn among the valid ones."""
        epsilon, count = self.epsilon(env_steps), len(observations)
        random = self.generator.random(count) < epsilon
        explorers = np.count_nonzero(random)
        if self.config.network.noisy:
            resample_noise(self.online.network.noisy_layers, self.noise_generator)
        if explorers == 0:
            return self.policy.best(observations, action_masks=action_masks)
        if action_masks is None:
            drawn = self.generator.integers(self.num_actions, size=count)
        else:
            drawn = np.where(action_masks, self.generator.random(action_masks.shape), -1.0).argmax(axis=1)
        if explorers == count:
            return drawn
        return np.where(random, drawn, self.policy.best(observations, action_masks=action_masks))

    def greedy(self, observations: np.ndarray, *, action_masks: np.ndarray | None = None) -> np.ndarray:
        """Return argmax Q [N], without noise."""
        return self.policy.greedy(observations, action_masks=action_masks)

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Add the space's first action."""
        return self.policy.to_environment(actions)

    # --- learning -------------------------------------------------------------------------------------------------

    def update(self, *, env_steps: int) -> dict[str, Any]:
        """One gradient step on one batch."""
        progress = min(1.0, env_steps / self.schedule.total_steps)
        self._synchronize(env_steps)
        prioritized = self.replay if isinstance(self.replay, PrioritizedReplayBuffer) else None
        if prioritized is not None:
            prioritized.beta = self.config.replay.beta_at(progress)
        batch = self.replay.sample(self.config.batch_size)
        if self.config.network.noisy:
            resample_noise(self.online.network.noisy_layers, self.noise_generator)
            if self.target is not None:
                resample_noise(self.target.network.noisy_layers, self.noise_generator)
        loss = self._differentiate(batch) if self.direct is None else self._differentiate_by_hand(self.direct, batch)
        norm = self.online.step(progress=progress)
        if prioritized is not None:
            errors = loss.errors.cpu().numpy() if isinstance(loss.errors, Tensor) else loss.errors
            prioritized.update_priorities(batch.indices, errors)
        if isinstance(self.config.target, SoftTarget):
            self.target.move_towards(self.online, rate=self.config.target.rate)
        return {"loss": loss.losses.mean(), "q_mean": loss.predictions.mean(), "grad_norm": norm}

    def _differentiate(self, batch: Transitions) -> LossAndGradient[Tensor]:
        """Leave the gradient of the batch's loss at the parameters."""
        with torch.no_grad():
            target = self.bootstrap(batch)
        outputs = self.online.network(batch.observations.to(self.device))
        weights = None if batch.weights is None else batch.weights.to(self.device)
        with torch.no_grad():
            loss = loss_of(self.config.values, outputs, batch.actions.to(self.device), target, weights=weights)
        self.online.zero_grad()
        outputs.backward(loss.gradient)
        return loss

    def _differentiate_by_hand(self, network: DirectGradient, batch: Transitions) -> LossAndGradient[Any]:
        """The same without autograd, and for scalar values without tensors."""
        with torch.no_grad():
            outputs = network.forward(batch.observations.numpy()).reshape(-1, *self._output_shape)
            values, weights = self.config.values, batch.weights
            if isinstance(values, ScalarValues):
                plain = None if weights is None else weights.numpy()
                targets = self._scalar_targets(batch)
                loss = scalar_loss(outputs, batch.actions.numpy(), targets, weights=plain, huber=values.huber)
                gradient = loss.gradient
            else:
                target = self.bootstrap(batch)
                loss = loss_of(values, torch.from_numpy(outputs), batch.actions, target, weights=weights)
                gradient = loss.gradient.numpy()
        network.backward(gradient.reshape(len(gradient), -1))
        return loss

    def _synchronize(self, env_steps: int) -> None:
        """Copy the online network to the target network once every `every_steps` environment steps."""
        if isinstance(self.config.target, HardTarget):
            period = env_steps // self.config.target.every_steps
            if period > self._synchronized:
                self._synchronized = period
                self.target.copy_from(self.online)

    def bootstrap(self, batch: Transitions) -> Tensor:
        """Return the target: [B] values, [B, M] probabilities, or [B, M] quantiles."""
        if self.direct is not None and isinstance(self.config.values, ScalarValues):
            return torch.from_numpy(self._scalar_targets(batch))
        following = batch.next_observations
        bootstrap = self._following(self.target or self.online, self.target_mirror, following)
        chooser = bootstrap
        if self.config.double:
            chooser = self._following(self.online, self.policy.mirror, following)
        best = expected_values(chooser, self.config.values)
        if batch.next_action_masks is not None:
            best = best.masked_fill(~batch.next_action_masks.to(self.device), -torch.inf)
        rewards, discounts = batch.rewards.to(self.device), batch.discounts.to(self.device)
        return target_of(self.config.values, taken(bootstrap, best.argmax(dim=1)), rewards=rewards, discounts=discounts)

    def _scalar_targets(self, batch: Transitions) -> np.ndarray:
        """`bootstrap` of values whose networks run in NumPy."""
        assert self.target_mirror is not None
        assert self.policy.mirror is not None
        following = batch.next_observations.numpy()
        values = self.target_mirror(following)
        chooser = self.policy.mirror(following) if self.config.double else values
        if batch.next_action_masks is not None:
            chooser = np.where(batch.next_action_masks.numpy(), chooser, -np.inf)
        # Not the maximum of what chooses: after the end no action may be valid, and 0 x -inf is no number.
        best = values.max(axis=1) if chooser is values else values[np.arange(len(values)), chooser.argmax(axis=1)]
        return batch.rewards.numpy() + batch.discounts.numpy() * best

    def _following(self, holder: FlatNetwork, mirror: NumpyMirror | None, observations: Tensor) -> Tensor:
        """Outputs [B, A, M] of a network that is only asked."""
        if mirror is not None:
            return torch.from_numpy(mirror(observations.numpy())).view(-1, *self._output_shape)
        return holder.network(observations.to(self.device))

    # --- state ----------------------------------------------------------------------------------------------------

    def policy_description(self) -> dict[str, Any]:
        """What `load_policy` needs beside the weights."""
        return policy_description(self.observation_space, self.action_space, self.config)

    def policy_tensors(self) -> dict[str, Tensor]:
        """The online network's weights."""
        return self.online.network.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizer, replay, generators and counters."""
        return {
            "online": self.online.state_dict(),
            "target": None if self.target is None else self.target.state_dict(),
            "replay": self.replay.state_dict(),
            "generator": self.generator.bit_generator.state,
            "noise_generator": self.noise_generator.get_state(),
            "synchronized": self._synchronized,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.online.load_state_dict(state["online"])
        if self.target is not None:
            self.target.load_state_dict(state["target"])
        self.replay.load_state_dict(state["replay"])
        self.generator.bit_generator.state = state["generator"]
        self.noise_generator.set_state(state["noise_generator"])
        self._synchronized = state["synchronized"]


def target_of(values: Values, following: Tensor, *, rewards: Tensor, discounts: Tensor) -> Tensor:
    """Return y of the outputs [B, M] of the chosen next actions.

    scalar: R + discount x Q. categorical: the distribution of R + discount x z, projected onto the atoms. quantile:
    R + discount x theta.
    """
    match values:
        case ScalarValues():
            return rewards + discounts * following[:, 0]
        case CategoricalValues():
            support = support_of(values, like=following)
            return project(following.softmax(dim=1), rewards[:, None] + discounts[:, None] * support, support)
        case QuantileValues():
            return rewards[:, None] + discounts[:, None] * following


def loss_of(
    values: Values, outputs: Tensor, actions: Tensor, target: Tensor, *, weights: Tensor | None
) -> LossAndGradient:
    """Return the loss that belongs to the kind of values, with its gradient."""
    match values:
        case ScalarValues():
            return scalar_loss(outputs, actions, target, weights=weights, huber=values.huber)
        case CategoricalValues():
            support = support_of(values, like=outputs)
            return categorical_loss(outputs, actions, target, support=support, weights=weights)
        case QuantileValues():
            return quantile_loss(outputs, actions, target, weights=weights, huber=values.huber)
