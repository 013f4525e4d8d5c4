"""The network: from a position to a policy over moves and the expected outcome."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from classic_rl.alphazero.games import GAMES, BoardGame, GameName
from classic_rl.alphazero.search import SearchConfig
from rlhf.config import Config
from rlhf.errors import ModelError


class BoardNetworkConfig(Config):
    """Shape of the convolutional network."""

    channels: int = Field(32, ge=1)
    """Of each 3 x 3 convolution."""
    layers: int = Field(3, ge=1)
    """Convolutions; from the second on each adds to its input."""
    hidden: int = Field(64, ge=1)
    """Width of the value head's hidden layer."""


class BoardNetwork(nn.Module):
    """A small residual network with two heads (AlphaZero's, without batch normalization).

    Batch statistics would make a position's value depend on what it is judged together with.
    """

    def __init__(self, game: BoardGame, config: BoardNetworkConfig) -> None:
        super().__init__()
        self.config, self.game = config, game
        widths = [2, *[config.channels] * config.layers]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=1) for inputs, outputs in pairwise(widths)
        )
        flat = config.channels * game.num_cells
        self.policy_head = nn.Linear(flat, game.num_actions)
        self.value_hidden, self.value_head = nn.Linear(flat, config.hidden), nn.Linear(config.hidden, 1)
        nn.init.zeros_(self.policy_head.weight)  # uniform priors and values of 0: the first search judges for itself
        nn.init.zeros_(self.value_head.weight)

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Planes [N, 2, rows, columns] -> (logits [N, A], values [N] in (-1, 1))."""
        x = planes
        for index, convolution in enumerate(self.convolutions):
            x = functional.relu(convolution(x) if index == 0 else x + convolution(x))
        x = x.flatten(1)
        values = torch.tanh(self.value_head(functional.relu(self.value_hidden(x)))).squeeze(-1)
        return self.policy_head(x), values

    @torch.inference_mode()
    def evaluate(self, boards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boards [N, cells] -> (priors [N, A], values [N]), as `classic_rl.alphazero.search` wants them."""
        device = self.policy_head.weight.device
        logits, values = self(torch.from_numpy(self.game.planes(boards)).to(device))
        return logits.softmax(-1).double().cpu().numpy(), values.double().cpu().numpy()

    def save(self, folder: str | Path, *, name: GameName, search: SearchConfig | None = None) -> None:
        """Write `network.safetensors` and `network.json`; `classic_rl.load` makes a player of them.

        Args:
            folder: Where.
            name: Of the game.
            search: How the player searches; None is the search's default.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in self.state_dict().items()},
                  folder / "network.safetensors")  # fmt: skip
        description = {
            "game": name,
            "network": self.config.model_dump(mode="json"),
            "search": (search or SearchConfig()).model_dump(mode="json"),
        }
        (folder / "network.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_network(folder: str | Path) -> BoardNetwork:
    """Read what `BoardNetwork.save` wrote.

    Raises:
        ModelError: The folder lacks a file, or a file is not what `save` writes.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / "network.json").read_text(encoding="utf-8"))
        game = GAMES[cast(GameName, description["game"])]()
        network = BoardNetwork(game, BoardNetworkConfig(**description["network"]))
        network.load_state_dict(load_file(folder / "network.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"not a saved network: {error}", where=str(folder)) from error
    return network


def load_search(folder: str | Path) -> SearchConfig:
    """Read how the saved network's player searches."""
    description = json.loads((Path(folder) / "network.json").read_text(encoding="utf-8"))
    return SearchConfig(**description.get("search", {}))
