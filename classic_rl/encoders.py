"""What stands before the actor and the critic and is shared by both: convolutions for images, and a memory."""

from __future__ import annotations

import math

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from classic_rl.networks import NetworkConfig
from classic_rl.q_networks import convolutions
from classic_rl.spaces import is_image, observation_size
from rlhf.training.linear import use_fast_linear


class Encoder(nn.Module):
    """Observations [B, T, ...] to features [B, T, F].

    Images go through the convolutions of `classic_rl.q_networks` and one layer (Mnih et al. 2015; the actor and the
    critic share them, as in Mnih et al. 2016). With a memory, an LSTM (Hochreiter and Schmidhuber 1997) or a GRU (Cho
    et al. 2014) follows; its state is 0 at the start of an episode.

    Args:
        observation_space: Of one observation.
        config: The shape.

    Raises:
        ConfigError: Convolutions and observations do not fit.
    """

    def __init__(self, observation_space: spaces.Space, config: NetworkConfig) -> None:
        super().__init__()
        self.convolutions: nn.Module | None = None
        self.memory: nn.LSTM | nn.GRU | None = None
        self.num_features = 0
        self.axes = 1
        """Axes of one observation."""
        if is_image(observation_space) or config.convolutions != "none":
            body, features = convolutions(observation_space, config.convolutions)
            self.convolutions, self.axes = nn.Sequential(body, nn.Linear(features, config.image_features), nn.ReLU()), 3
            self.num_features = config.image_features
            if config.initialization == "orthogonal":
                _orthogonal(self.convolutions)
            if config.kernel == "auto":
                use_fast_linear(self.convolutions)
        else:
            self.num_features = observation_size(observation_space)
        if config.memory is not None:
            maker = nn.LSTM if config.memory.cell == "lstm" else nn.GRU
            self.memory = maker(self.num_features, config.memory.size, batch_first=True)
            self.num_features = config.memory.size

    @property
    def state_size(self) -> int:
        """K, numbers that the memory keeps: an LSTM's hidden state and cell, a GRU's hidden state."""
        if self.memory is None:
            return 0
        return self.memory.hidden_size * (2 if isinstance(self.memory, nn.LSTM) else 1)

    def forward(self, observations: Tensor, *, starts: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """Encode.

        Args:
            observations: [..., observation]; [B, T, observation] with a memory.
            starts: [B, T] bool, True where an episode begins: the state is 0 before that observation.
            state: [B, K], the memory before the first observation; None is 0.

        Returns:
            Features [..., F].
        """
        x, leading = observations, observations.shape[: observations.ndim - self.axes]
        if self.convolutions is not None:
            x = self.convolutions(x.reshape(-1, *x.shape[len(leading) :])).view(*leading, -1)
        if self.memory is None:
            return x
        rows, steps = x.shape[:2]
        begins = torch.zeros(rows, steps, dtype=torch.bool, device=x.device) if starts is None else starts.clone()
        begins[:, 0] = True
        initial = x.new_zeros(rows, self.state_size) if state is None else state
        if starts is not None:
            initial = initial.masked_fill(starts[:, :1], 0.0)
        return self._remember(x, begins, initial)

    def _remember(self, x: Tensor, begins: Tensor, initial: Tensor) -> Tensor:
        """Run the memory over every episode in one call: each piece of a row becomes a padded row of its own."""
        assert self.memory is not None
        rows, steps = begins.shape
        first = begins.flatten().nonzero().squeeze(1)  # where pieces begin, row after row
        piece = begins.flatten().cumsum(0) - 1
        position = torch.arange(rows * steps, device=x.device) - first[piece]
        length = int(position.max()) + 1
        padded = x.new_zeros(len(first), length, x.shape[-1])
        padded[piece, position] = x.flatten(0, 1)
        state = x.new_zeros(len(first), initial.shape[1])
        state[piece.view(rows, steps)[:, 0]] = initial
        outputs, _ = self.memory(padded, _as_torch_wants(self.memory, state))
        return outputs[piece, position].view(rows, steps, -1)


def _orthogonal(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


def _as_torch_wants(memory: nn.LSTM | nn.GRU, state: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(memory, nn.GRU):
        return state.unsqueeze(0)
    hidden, cell = state.split(memory.hidden_size, dim=1)
    return hidden.unsqueeze(0).contiguous(), cell.unsqueeze(0).contiguous()


def make_encoder(observation_space: spaces.Space, config: NetworkConfig) -> Encoder | None:
    """Return what the network needs before its layers; None where vectors go straight into them."""
    if config.memory is None and config.convolutions == "none" and not is_image(observation_space):
        return None
    return Encoder(observation_space, config)


class NumpyMemory:
    """One step of an LSTM or GRU on NumPy views of its parameters: a third of torch's time for few rows.

        LSTM: i, f, g, o = W x + U h + b;  c' = s(f) c + s(i) tanh(g);  h' = s(o) tanh(c')
        GRU:  r, z = s(W x + U h + b);  n = tanh(W_n x + b_n + r (U_n h + c_n));  h' = (1 - z) n + z h

    with the logistic function s, in the order and form of `torch.nn.LSTM` and `torch.nn.GRU`.
    """

    def __init__(self, memory: nn.LSTM | nn.GRU) -> None:
        self.memory, self.size, self.is_lstm = memory, memory.hidden_size, isinstance(memory, nn.LSTM)
        self.refresh()

    def refresh(self) -> None:
        """Fetch the views again; parameters on another device are copied."""
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        self._parameters = [getattr(self.memory, name).detach().cpu().numpy() for name in names]

    def __call__(self, x: np.ndarray, state: np.ndarray) -> np.ndarray:
        """From x [N, F] and state [N, K] to the next state [N, K], whose first columns are the features."""
        weight, recurrent, bias, recurrent_bias = self._parameters
        size, hidden = self.size, state[:, : self.size]
        own, carried = x.dot(weight.T) + bias, hidden.dot(recurrent.T) + recurrent_bias
        if self.is_lstm:
            gates = own + carried
            opened = _logistic(gates)
            candidate = np.tanh(gates[:, 2 * size : 3 * size])
            cell = opened[:, size : 2 * size] * state[:, size:] + opened[:, :size] * candidate
            return np.concatenate([opened[:, 3 * size :] * np.tanh(cell), cell], axis=1)
        opened = _logistic(own[:, : 2 * size] + carried[:, : 2 * size])
        candidate = np.tanh(own[:, 2 * size :] + opened[:, :size] * carried[:, 2 * size :])
        return candidate + opened[:, size:] * (hidden - candidate)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))  # never overflows
