"""The loop of AlphaZero: play against oneself, learn from it, judge.

loss = (z - v)^2 - pi^T log p + c ||theta||^2        (Silver et al. 2017, https://arxiv.org/abs/1712.01815, equation 1)
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, assert_never

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from classic_rl.alphazero.games import GAMES, BoardGame, GameName
from classic_rl.alphazero.network import BoardNetwork, BoardNetworkConfig
from classic_rl.alphazero.players import (
    PerfectPlayer,
    Player,
    play_both_sides,
    pure_mcts,
    random_openings,
    random_player,
    searching_player,
    worst_outcome,
)
from classic_rl.alphazero.self_play import SelfPlay, SelfPlayConfig, Window
from rlhf.config import Config
from rlhf.training.run import Run


class RandomOpponent(Config):
    """Random legal moves."""

    type: Literal["random"] = "random"


class PureMctsOpponent(Config):
    """Tree search by random rollouts alone."""

    type: Literal["pure_mcts"] = "pure_mcts"
    rollouts: int = Field(200, ge=1)
    """Simulations per move, one random game each."""


class PerfectOpponent(Config):
    """Minimax over the whole game; TicTacToe only. The player is also tested against every possible opponent."""

    type: Literal["perfect"] = "perfect"


class MatchConfig(Config):
    """How the player is judged: every opening is played twice, once from each side."""

    opponents: list[Annotated[RandomOpponent | PureMctsOpponent | PerfectOpponent, Field(discriminator="type")]]
    """Whom it meets."""
    openings: int = Field(50, ge=1)
    """Random starts; twice as many games."""
    opening_moves: int = Field(2, ge=0)
    """Random moves before the players take over; deterministic players would repeat one game otherwise."""
    simulations: int | None = Field(None, ge=1)
    """Of the player's search; null takes those of self-play."""
    seed: int = 1_000_000
    """Of openings and opponents; the same ones in every evaluation."""


class LearningConfig(Config):
    """How the network learns."""

    batch_size: int = Field(256, ge=1)
    """Positions per update."""
    updates_per_iteration: int = Field(32, ge=1)
    """Gradient steps after each round of self-play."""
    learning_rate: float = Field(2e-3, gt=0)
    """Of AdamW."""
    weight_decay: float = Field(1e-4, ge=0)
    """The paper's c ||theta||^2, decoupled."""
    window: int = Field(20_000, ge=1)
    """Latest positions that are learnt from."""


class AlphaZero:
    """Network, games in progress and window of one run.

    Args:
        name: Of the game.
        network, self_play, learning: Settings.
        seed: Of weights, moves and minibatches.
    """

    def __init__(
        self,
        name: GameName,
        *,
        network: BoardNetworkConfig | None = None,
        self_play: SelfPlayConfig | None = None,
        learning: LearningConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.name, self.game = name, GAMES[name]()
        self.learning, self_play = learning or LearningConfig(), self_play or SelfPlayConfig()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = BoardNetwork(self.game, network or BoardNetworkConfig())
        rate, decay = self.learning.learning_rate, self.learning.weight_decay
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=rate, weight_decay=decay, fused=True)
        self.generator = np.random.default_rng(seed)
        self.self_play = SelfPlay(self.game, self.network.evaluate, self_play, generator=self.generator)
        self.window = Window(self.game, capacity=self.learning.window)

    def iterate(self) -> dict[str, float]:
        """Play, then learn; returns metrics. Before a first game has ended there is nothing to learn from."""
        positions, metrics = self.self_play.play()
        self.window.add(positions)
        metrics["window"] = float(len(self.window))
        if len(self.window):
            losses = [self.update() for _ in range(self.learning.updates_per_iteration)]
            for name, values in zip(("policy_loss", "value_loss"), zip(*losses, strict=True), strict=True):
                metrics[name] = float(torch.stack(values).mean())
        return metrics

    def update(self) -> tuple[Tensor, Tensor]:
        """Make one gradient step; returns the policy's and the value's loss."""
        batch = self.window.sample(self.learning.batch_size, generator=self.generator)
        logits, values = self.network(torch.from_numpy(self.game.planes(batch.boards)))
        policy_loss = -(torch.from_numpy(batch.policies) * logits.log_softmax(-1)).sum(-1).mean()
        value_loss = functional.mse_loss(values, torch.from_numpy(batch.outcomes))
        self.optimizer.zero_grad()
        (policy_loss + value_loss).backward()
        self.optimizer.step()
        return policy_loss.detach(), value_loss.detach()

    def player(self, *, simulations: int | None = None) -> Player:
        """Return the player: the search's most visited move."""
        own = self.self_play.config.search
        search = own.model_copy(update={"simulations": simulations or own.simulations})
        return searching_player(self.game, self.network.evaluate, search)

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on exactly needs."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "self_play": self.self_play.state_dict(),
            "window": self.window.state_dict(),
            "generator": self.generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.self_play.load_state_dict(state["self_play"])
        self.window.load_state_dict(state["window"])
        self.generator.bit_generator.state = state["generator"]


def judge(game: BoardGame, player: Player, config: MatchConfig) -> dict[str, float]:
    """Play the matches.

    Returns:
        `<opponent>_score` (points per game, a draw 1/2), `<opponent>_won`, `_drawn`, `_lost` (games), and with a
        perfect opponent `worst_outcome`: 0 if nobody can beat the player, whoever moves first.
    """
    metrics: dict[str, float] = {}
    openings = random_openings(game, count=config.openings, moves=config.opening_moves, seed=config.seed)
    for opponent in config.opponents:
        score = play_both_sides(game, player, _make_opponent(game, opponent, config.seed), openings=openings)
        metrics[f"{opponent.type}_score"] = score.mean()
        metrics |= {f"{opponent.type}_{name}": float(count) for name, count in score._asdict().items()}
        if isinstance(opponent, PerfectOpponent):
            outcomes = [worst_outcome(game, player, moves_first=first) for first in (True, False)]
            metrics["worst_outcome"] = float(min(outcomes))
    return metrics


def _make_opponent(game: BoardGame, opponent: RandomOpponent | PureMctsOpponent | PerfectOpponent, seed: int) -> Player:
    match opponent:
        case RandomOpponent():
            return random_player(game, seed=seed)
        case PureMctsOpponent(rollouts=rollouts):
            return pure_mcts(game, rollouts=rollouts, seed=seed)
        case PerfectOpponent():
            return PerfectPlayer(game)
    assert_never(opponent)


def learn(agent: AlphaZero, run: Run, *, matches: MatchConfig) -> dict[str, float]:
    """Iterate until the run is done; returns the metrics of summary.json."""
    run.evaluate = lambda: judge(agent.game, agent.player(simulations=matches.simulations), matches)
    run.track(agent=agent)
    try:
        for iteration in run.iterations():
            run.finish_iteration(iteration, None, agent.iterate())
    except BaseException:
        run.stopped()
        raise
    return run.finish()
