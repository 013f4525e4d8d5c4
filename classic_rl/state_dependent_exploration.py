"""Generalized state-dependent exploration (gSDE): noise that is a linear function of the state, held for some steps.

    exploration  eps(s) = z(s)^T E,   E_ij ~ N(0, std_ij),   z(s): the actor's last hidden layer
    so that      a | s ~ N(mean(s), z(s)^2 std^2)  per component, when E is averaged out

Within the steps that share one E the noise repeats itself in equal states, so motion is smooth; independent noise at
every step shakes, and cancels out. The log-probability is the marginal one.
Source: Raffin, Kober and Stulp 2021, "Smooth exploration for robotic reinforcement learning",
https://arxiv.org/abs/2005.05719, equations 4 to 8; definitions as in Stable-Baselines3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from classic_rl.continuous_networks import ContinuousNetworkConfig
from classic_rl.distributions import HALF_LOG_TWO_PI, BoxDistribution
from classic_rl.distributions import StateDependentExploration as StateDependentExploration
from classic_rl.squashed import squashed_log_prob
from rlhf.errors import ConfigError

_VARIANCE_FLOOR = 1e-6
MEAN_BOUND = 2.0
"""Of SAC's means before tanh: without it, tanh saturates and the gradient dies (Stable-Baselines3's clip_mean)."""


def marginal_std(features: Tensor, log_std: Tensor) -> Tensor:
    """Return sqrt(z^2 std^2 + 1e-6), the standard deviation of z^T E.

    Args:
        features: [..., H].
        log_std: [H, A].

    Returns:
        [..., A].

    >>> marginal_std(torch.tensor([3.0, 4.0]), torch.zeros(2, 1)).round(decimals=4)  # sqrt(9 + 16)
    tensor([5.])
    """
    return torch.sqrt(features.square() @ torch.exp(2 * log_std) + _VARIANCE_FLOOR)


class StateDependentGaussian(BoxDistribution):
    """gSDE for on-policy algorithms: unsquashed, clipped on the way into the environment.

    Parameters are the means [..., A] followed by the features [..., H], which carry no gradient here: exploration must
    not shape what the network sees (Stable-Baselines3's learn_features=False).

    Args:
        space: A Box of floats.
        config: How noise is made.
        num_features: H.

    Raises:
        ConfigError: Another space.
    """

    def __init__(self, space: spaces.Space, *, config: StateDependentExploration, num_features: int) -> None:
        if not isinstance(space, spaces.Box):
            raise ConfigError(
                "state-dependent exploration adds noise to real numbers",
                where="network.state_dependent",
                got=str(space),
                expected="a Box as action space",
                remedy="Remove network.state_dependent.",
            )
        super().__init__(space)
        self.config, self.num_features = config, num_features
        self.log_std = nn.Parameter(torch.full((num_features, self.num_outputs), config.initial_log_std))

    def log_probs_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Those of N(mean, z^2 std^2), summed over components."""
        mean, log_std = self.means_and_log_std(parameters)
        log_probs = -0.5 * ((actions - mean) / log_std.exp()).square() - log_std - HALF_LOG_TWO_PI
        return log_probs.sum(dim=-1), (log_std + 0.5 + HALF_LOG_TWO_PI).sum(dim=-1)

    def means_and_log_std(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """[..., A] each, of the marginal distribution."""
        mean, features = parameters.split([self.num_outputs, self.num_features], dim=-1)
        return mean, marginal_std(features.detach(), self.log_std).log()

    def noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal matrices [*shape, H, A]; along the first of several axes, `sample_every` steps share one."""
        form = (self.num_features, self.num_outputs)
        if len(shape) == 1:
            return generator.standard_normal(size=(*shape, *form), dtype=np.float32)
        steps = self.config.sample_every or shape[0]
        draws = generator.standard_normal(size=(-(-shape[0] // steps), *shape[1:], *form), dtype=np.float32)
        return draws[np.arange(shape[0]) // steps] if steps < shape[0] else np.broadcast_to(draws, (*shape, *form))

    def sample(self, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Return mean + z^T (std x noise)."""
        mean, features = parameters[:, : self.num_outputs], parameters[:, self.num_outputs :]
        matrices = np.exp(self.log_std.detach().cpu().numpy()) * noise
        return mean + np.einsum("nh,nha->na", features, matrices)

    def greedy(self, parameters: np.ndarray) -> np.ndarray:
        """The mean."""
        return parameters[:, : self.num_outputs]


class StateDependentActor(nn.Module):
    """gSDE for SAC: squashed, and features learn from the exploration's gradient as well.

    Args:
        observations: Length of an observation.
        actions: Length of an action.
        network: Shape of the hidden layers.
        config: How noise is made.
        seed: Of the initial weights.
    """

    def __init__(
        self,
        observations: int,
        actions: int,
        *,
        network: ContinuousNetworkConfig,
        config: StateDependentExploration,
        seed: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.trunk = network.make(observations, actions, seed=seed)
        self.log_std = nn.Parameter(torch.full((network.hidden_sizes[-1], actions), config.initial_log_std))

    def matrix(self, generator: torch.Generator) -> Tensor:
        """Draw standard normals [H, A] for one update."""
        return torch.randn(self.log_std.shape, generator=generator, device=self.log_std.device)

    def forward(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw actions [B, A] with one exploration matrix std x noise for the whole batch, and score them [B]."""
        outputs, features = self.trunk.with_features(observations)
        mean, features = nn.functional.hardtanh(outputs[0], -MEAN_BOUND, MEAN_BOUND), features[0]
        u = mean + features @ (self.log_std.exp() * noise)
        return torch.tanh(u), squashed_log_prob(u, mean, marginal_std(features, self.log_std))

    def greedy(self, outputs: np.ndarray) -> np.ndarray:
        """Tanh of the bounded mean."""
        return np.tanh(np.clip(outputs, -MEAN_BOUND, MEAN_BOUND))

    def exploration_matrices(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Draw E [count, H, A]."""
        std = np.exp(self.log_std.detach().cpu().numpy())
        return std * generator.standard_normal(size=(count, *std.shape), dtype=np.float32)

    def explore(self, outputs: np.ndarray, features: np.ndarray, matrices: np.ndarray) -> np.ndarray:
        """Return tanh(mean + z^T E) for rows [N, ...] with a matrix each."""
        mean = np.clip(outputs, -MEAN_BOUND, MEAN_BOUND)
        return np.tanh(mean + np.einsum("nh,nha->na", features, matrices))

    def draw(self, outputs: np.ndarray, features: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Draw actions with a fresh matrix per row."""
        return self.explore(outputs, features, self.exploration_matrices(generator, len(outputs)))


class HeldMatrices:
    """The exploration matrices of running environments, renewed every `sample_every` steps.

    Args:
        actor: Whose standard deviations are read when matrices are drawn.
        num_envs: N; each environment has its own matrix.
    """

    def __init__(self, actor: StateDependentActor, *, num_envs: int) -> None:
        self._actor, self._num_envs = actor, num_envs
        self._every = actor.config.sample_every or 1
        self._steps, self._matrices = 0, np.zeros((num_envs, *actor.log_std.shape), dtype=np.float32)

    def __call__(self, generator: np.random.Generator) -> np.ndarray:
        """Return the next step's matrices [N, H, A]."""
        if self._steps % self._every == 0:
            self._matrices = self._actor.exploration_matrices(generator, self._num_envs)
        self._steps += 1
        return self._matrices

    def state_dict(self) -> dict[str, Any]:
        """Matrices, and how long they have been used."""
        return {"steps": self._steps, "matrices": self._matrices.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s content."""
        self._steps, self._matrices = state["steps"], np.array(state["matrices"], dtype=np.float32)
