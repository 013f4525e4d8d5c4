"""Q networks: an encoder (layers, or convolutions for images), then one head, or a value and an advantage stream."""

from __future__ import annotations

from typing import Literal

import torch
from gymnasium import spaces
from pydantic import Field
from torch import Tensor, nn

from classic_rl.networks import MLP, Activation
from classic_rl.noisy import NoisyLinear
from classic_rl.spaces import is_image, observation_size
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.training.linear import use_fast_linear


class DuelingConfig(Config):
    """Two streams: V(s) and A(s, a)."""

    aggregation: Literal["mean", "max", "naive"] = "mean"
    """mean: V + A - mean A (the paper's experiments); max: V + A - max A, where V is max Q; naive: V + A, in which V
    and A cannot be told apart."""
    rescale_trunk_gradient: bool = False
    """Multiply the gradient that enters the shared layers by 1/sqrt 2, as the paper does (which clips norms at 10)."""


class QNetworkConfig(Config):
    """Shape of a Q network."""

    hidden_sizes: list[int] = Field(default=[256, 256], min_length=1)
    """Hidden layers, after the convolutions where there are any. With dueling each stream has the last one itself."""
    activation: Activation = "relu"
    convolutions: Literal["nature", "minatar", "none"] = "none"
    """Of image observations: nature is Mnih et al. 2015's for 4 x 84 x 84 frames, minatar Young and Tian 2019's for
    10 x 10 x channels."""
    dueling: DuelingConfig | None = None
    """Null is one head."""
    noisy: bool = False
    """Noisy layers instead of plain ones from the last hidden layer on; they explore, and epsilon may be 0."""
    noisy_sigma: float = Field(0.5, ge=0)
    """Where the noise's scale starts, times 1/sqrt(inputs)."""
    kernel: Literal["auto", "torch"] = "auto"
    """auto computes plain networks in NumPy on the CPU, which takes less than torch, and layers after convolutions by
    `rlhf.training.linear`; torch leaves all to torch."""


def aggregate(values: Tensor, advantages: Tensor, *, aggregation: Literal["mean", "max", "naive"]) -> Tensor:
    """Return Q [B, A, M] of V [B, 1, M] and A [B, A, M].

    mean: V + A - mean_a A (equation 9), max: V + A - max_a A (8; the paper's "a' in |A|" is a misprint of a' in A),
    naive: V + A (7). Source: Wang et al. 2016, https://arxiv.org/abs/1511.06581.

    >>> advantages = torch.tensor([0.2, -0.4, 0.8]).view(1, 3, 1)
    >>> aggregate(torch.full((1, 1, 1), 1.5), advantages, aggregation="mean").flatten()
    tensor([1.5000, 0.9000, 2.1000])
    """
    match aggregation:
        case "mean":
            return values + advantages - advantages.mean(dim=1, keepdim=True)
        case "max":
            return values + advantages - advantages.amax(dim=1, keepdim=True)
        case "naive":
            return values + advantages


class QNetwork(nn.Module):
    """Observations [B, ...] to outputs [B, A, M].

    Args:
        observation_space: Of one observation.
        num_actions: A.
        size: M, outputs per action (`classic_rl.distributional`).
        config: The shape.
        seed: Of the initial weights (torch's default ones), apart from torch's global generator.

    Raises:
        ConfigError: Convolutions and observations do not fit.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        num_actions: int,
        *,
        size: int = 1,
        config: QNetworkConfig | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or QNetworkConfig()
        self.num_actions, self.size = num_actions, size
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.convolutions, features = convolutions(observation_space, config.convolutions)
            self.plain = self.trunk = self.value = self.advantage = None
            self.noisy_layers: list[NoisyLinear] = []
            outputs = num_actions * size
            if self.is_plain:
                self.plain = MLP(
                    [features, *config.hidden_sizes, outputs], activation=config.activation, kernel=config.kernel
                )
                for layer in self.plain.layers:
                    layer.reset_parameters()
                self._quicken()
                return
            *shared, last = [features, *config.hidden_sizes]
            widths = [*shared, last]
            # Shared layers are plain; the last hidden layer and the outputs belong to the head or the streams.
            self.trunk = _layers(widths[:-1], config, noisy=False)
            self.advantage = _layers([*widths[-2:], outputs], config, noisy=config.noisy, ends=True)
            if config.dueling is not None:
                self.value = _layers([*widths[-2:], size], config, noisy=config.noisy, ends=True)
            self.noisy_layers = [layer for layer in self.modules() if isinstance(layer, NoisyLinear)]
            self._quicken()

    def _quicken(self) -> None:
        """The layers after convolutions are wide enough for it."""
        if self.convolutions is not None and self.config.kernel == "auto":
            use_fast_linear(self)

    @property
    def is_plain(self) -> bool:
        """Whether the network is one `MLP`, after convolutions where there are any."""
        return self.config.dueling is None and not self.config.noisy

    @property
    def runs_in_numpy(self) -> bool:
        """Whether the whole network can be computed in NumPy: an `MLP` of vectors on the CPU."""
        if self.plain is None or self.convolutions is not None or self.config.kernel != "auto":
            return False
        weight = self.plain.layers[0].weight
        return bool(weight.is_cpu) and weight.dtype == torch.float32

    def features(self, observations: Tensor) -> Tensor:
        """What the streams share, [B, F]."""
        x = observations
        if self.convolutions is not None:
            x = self.convolutions(x)
        return x if self.trunk is None else self.trunk(x)

    def streams(self, observations: Tensor) -> tuple[Tensor | None, Tensor]:
        """V [B, 1, M] (None without dueling) and A [B, A, M]."""
        x = self.features(observations)
        if self.plain is not None:
            return None, self.plain(x).view(-1, self.num_actions, self.size)
        dueling = self.config.dueling
        if dueling is not None and dueling.rescale_trunk_gradient and x.requires_grad:
            x = x * 0.5**0.5 + x.detach() * (1 - 0.5**0.5)
        assert self.advantage is not None
        advantages = self.advantage(x).view(-1, self.num_actions, self.size)
        return None if self.value is None else self.value(x).view(-1, 1, self.size), advantages

    def forward(self, observations: Tensor) -> Tensor:
        """Map observations to outputs [B, A, M]."""
        values, advantages = self.streams(observations)
        if values is None:
            return advantages
        return aggregate(values, advantages, aggregation=self.config.dueling.aggregation)


def _layers(widths: list[int], config: QNetworkConfig, *, noisy: bool, ends: bool = False) -> nn.Sequential:
    """Linear layers, each followed by the activation, but for the last one where the network `ends` there."""
    layers: list[nn.Module] = []
    for index in range(len(widths) - 1):
        inputs, outputs = widths[index], widths[index + 1]
        layers.append(
            NoisyLinear(inputs, outputs, initial_sigma=config.noisy_sigma) if noisy else nn.Linear(inputs, outputs)
        )
        if not (ends and index == len(widths) - 2):
            layers.append(nn.Tanh() if config.activation == "tanh" else nn.ReLU())
    return nn.Sequential(*layers)


class Scale(nn.Module):
    """Images of bytes to floats: x * factor, with the channels first.

    Args:
        factor: The factor.
        channels_last: Whether images come as [B, H, W, C].
        memory_format: How the floats lie in memory: a CPU convolves Nature's frames sooner where the channels of a
            pixel are neighbours, MinAtar's small boards where they are not.
    """

    def __init__(self, factor: float, *, channels_last: bool, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.factor, self.channels_last, self.memory_format = factor, channels_last, memory_format

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] or [B, H, W, C] bytes or floats to [B, C, H, W] floats."""
        x = x.permute(0, 3, 1, 2) if self.channels_last else x
        x = x.contiguous(memory_format=self.memory_format)
        if x.dtype == torch.uint8:
            return x.float().mul_(self.factor)
        return x if self.factor == 1.0 else x * self.factor


Convolutions = Literal["nature", "minatar", "none"]


def convolutions(space: spaces.Space, kind: Convolutions) -> tuple[nn.Module | None, int]:
    """Return the convolutional part with its number of features; None for vectors.

    Raises:
        ConfigError: The images do not fit.
    """
    if not is_image(space):
        if kind != "none":
            raise ConfigError("vectors need no convolutions", where="network.convolutions", got=str(space))
        return None, observation_size(space)
    shape = tuple(space.shape or ())
    match kind:
        case "none":
            raise ConfigError(
                "image observations need convolutions",
                where="network.convolutions",
                got=f"none, with observations {shape}",
                expected="nature for frames [4, 84, 84], minatar for [10, 10, channels]",
            )
        case "nature":
            channels_last = shape[-1] < min(shape[0], shape[1])
            channels = shape[-1] if channels_last else shape[0]
            body = nn.Sequential(
                Scale(1 / 255, channels_last=channels_last, memory_format=torch.channels_last),
                nn.Conv2d(channels, 32, 8, 4),
                nn.ReLU(),
                nn.Conv2d(32, 64, 4, 2),
                nn.ReLU(),
                nn.Conv2d(64, 64, 3, 1),
                nn.ReLU(),
                nn.Flatten(),
            )
        case "minatar":
            body = nn.Sequential(
                Scale(1.0, channels_last=True, memory_format=torch.contiguous_format),
                nn.Conv2d(shape[-1], 16, 3, 1),
                nn.ReLU(),
                nn.Flatten(),
            )
    try:
        with torch.no_grad():
            features = body(torch.zeros(1, *shape)).shape[1]
    except RuntimeError as error:
        raise ConfigError(
            "the images are too small for these convolutions", where="network.convolutions", got=str(shape)
        ) from error
    return body, features
