"""Learn a board game by playing against oneself: tree search guided by a network that learns from the search."""

from __future__ import annotations

from pydantic import Field

from classic_rl.alphazero.games import GameName
from classic_rl.alphazero.learning import AlphaZero, LearningConfig, MatchConfig, learn
from classic_rl.alphazero.network import BoardNetworkConfig
from classic_rl.alphazero.self_play import SelfPlayConfig
from classic_rl.threads import limit_threads
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig


class AlphaZeroConfig(Config):
    """A run: a game, a network, how much of search and learning."""

    game: GameName
    """tictactoe or connect_four."""
    network: BoardNetworkConfig = BoardNetworkConfig()
    self_play: SelfPlayConfig = SelfPlayConfig()
    learning: LearningConfig = LearningConfig()
    iterations: int = Field(ge=1)
    """Rounds of self-play; each is followed by updates."""
    evaluation: MatchConfig
    threads: int = Field(1, ge=1)
    """Of torch and NumPy."""
    run: RunConfig = RunConfig()


def main(config: AlphaZeroConfig) -> dict[str, float]:
    """Play, learn, judge, save the network to `<run directory>/network`."""
    limit_threads(config.threads)
    agent = AlphaZero(
        config.game,
        network=config.network,
        self_play=config.self_play,
        learning=config.learning,
        seed=config.run.seed,
    )
    run = Run(config.run, resolved=config, iterations=config.iterations, recipe="alphazero")
    metrics = learn(agent, run, matches=config.evaluation)
    agent.network.save(run.directory / "network", name=config.game, search=config.self_play.search)
    return metrics


CONFIG = AlphaZeroConfig

if __name__ == "__main__":
    launch(__file__)
