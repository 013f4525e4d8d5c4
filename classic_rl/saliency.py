"""Where a dueling network looks: |dV/ds| and |dA/ds|.

Wang et al. 2016, Dueling Network Architectures, figure 2, https://arxiv.org/abs/1511.06581: on a driving game the value
stream attends to the road ahead, the advantage stream to cars close by.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from classic_rl.agents import AgentConfig
from classic_rl.distributional import Values, expected_values
from classic_rl.dqn_config import DQNConfig
from classic_rl.dqn_policy import GreedyQ
from classic_rl.environments import EnvironmentConfig, make_environments
from classic_rl.evaluation import EvaluationConfig, greedy_observations
from classic_rl.q_networks import QNetwork
from rlhf.errors import ConfigError, ModelError


class Saliency(NamedTuple):
    """Per observation, in its shape."""

    value: np.ndarray
    """[B, ...], |dV(s)/ds|."""
    advantage: np.ndarray
    """[B, ...], |dA(s, argmax_a A)/ds|."""


def saliency(network: QNetwork, observations: np.ndarray, *, values: Values) -> Saliency:
    """Return the absolute gradients of both streams with respect to the observations.

    The advantage is that of the best action, A(s, argmax_a A(s, a)), as in the paper. With distributional values both
    are the expectation of the stream's outputs read as values (quantiles), or of its logits' softmax (categorical).

    Args:
        network: With dueling streams.
        observations: [B, ...] as stored.
        values: What the network's outputs mean.

    Raises:
        ModelError: A network without dueling streams.
    """
    if network.value is None:
        raise ModelError(
            "saliency of value and advantage needs a dueling network", where="saliency", remedy="Set network.dueling."
        )
    maps = []
    device = next(network.parameters()).device
    for stream in (0, 1):
        inputs = torch.from_numpy(observations).float().to(device).requires_grad_(True)
        outputs = network.streams(inputs)[stream]
        best = expected_values(outputs, values).amax(dim=1)
        (gradient,) = torch.autograd.grad(best.sum(), inputs)
        maps.append(gradient.abs().cpu().numpy())
    return Saliency(*maps)


def require_streams(agent: AgentConfig) -> None:
    """Refuse, before anything is trained, an agent whose maps cannot be drawn.

    Raises:
        ConfigError: No DQN with dueling streams of images.
    """
    if not isinstance(agent, DQNConfig) or agent.network.dueling is None or agent.network.convolutions == "none":
        raise ConfigError(
            "maps of value and advantage need a dueling network of images",
            where="saliency_images",
            got=agent.type,
            expected="agent.type dqn with network.dueling and network.convolutions",
            remedy="Set saliency_images=0.",
        )


def draw_game(
    file: Path, policy: GreedyQ, environment: EnvironmentConfig, evaluation: EvaluationConfig, *, images: int
) -> None:
    """Draw the maps of observations spread evenly over one greedy episode.

    Args:
        file: The image to write.
        policy: With a dueling network of images.
        environment: Where it plays.
        evaluation: Seed and limit of the episode.
        images: Observations; fewer where the episode has fewer.
    """
    environments = make_environments(evaluation.adapt(environment), num_envs=1, images=True)
    try:
        seen = greedy_observations(policy, environments, evaluation)
    finally:
        environments.close()
    chosen = seen[np.unique(np.linspace(0, len(seen) - 1, images).round().astype(int))]
    shape = chosen.shape[1:]
    channels_first = policy.network.config.convolutions == "nature" and shape[0] < min(shape[1:])
    draw_saliency(file, chosen, saliency(policy.network, chosen, values=policy.values), channels_first=channels_first)


def draw_saliency(file: Path, observations: np.ndarray, maps: Saliency, *, channels_first: bool) -> None:
    """Draw for each image the newest frame (or the sum of channels), and both maps over it.

    Args:
        file: The image to write.
        observations: [B, C, H, W] or [B, H, W, C].
        maps: Of `saliency`.
        channels_first: Which of the two; frames stacked first show the last one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(len(observations), 3, figsize=(7.5, 2.5 * len(observations)), squeeze=False)
    for row, observation, value, advantage in zip(grid, observations, maps.value, maps.advantage, strict=True):
        image = observation[-1] if channels_first else observation.sum(axis=-1)
        axis = 0 if channels_first else -1
        for axes, heat, title in zip(row, (None, value, advantage), ("observation", "|dV/ds|", "|dA/ds|"), strict=True):
            axes.imshow(image, cmap="gray")
            if heat is not None:
                axes.imshow(heat.sum(axis=axis), cmap="hot", alpha=0.7)
            axes.set_title(title)
            axes.axis("off")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)
