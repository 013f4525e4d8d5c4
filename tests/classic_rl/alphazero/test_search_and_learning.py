"""The search against arithmetic, and that learning plays, resumes and gets better."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from classic_rl.alphazero.games import ConnectFour, Moved, TicTacToe
from classic_rl.alphazero.learning import AlphaZero, LearningConfig
from classic_rl.alphazero.network import load_network
from classic_rl.alphazero.players import worst_outcome
from classic_rl.alphazero.search import Search, SearchConfig
from classic_rl.alphazero.self_play import Positions, SelfPlayConfig, Window
from rlhf.errors import ModelError


class Endless:
    """Two moves everywhere, and no end."""

    num_actions, num_cells = 2, 1

    def legal(self, boards):
        return np.ones((len(boards), 2), dtype=bool)

    def play(self, boards, actions):
        never = np.zeros(len(boards), dtype=bool)
        return Moved(boards, never, never)


def constant(priors, value):
    return lambda boards: (np.tile(priors, (len(boards), 1)), np.full(len(boards), value))


def uniform(game):
    return lambda boards: (np.ones((len(boards), game.num_actions)), np.zeros(len(boards)))


def test_puct_by_hand():
    # With values of 0 only U = c P sqrt(N) / (1 + n) counts (N at least 1). P = .7, .3; n after each simulation:
    # .7 > .3 -> (1,0);  .7/2 = .35 > .3 -> (2,0);  .7*1.41/3 = .33 < .3*1.41 = .42 -> (2,1);
    # .7*1.73/3 = .40 > .3*1.73/2 = .26 -> (3,1);  .7*2/4 = .35 > .3*2/2 = .30 -> (4,1);  .7*2.24/5 = .31 < .34 -> (4,2)
    search = Search(Endless(), constant([0.7, 0.3], 0.0), SearchConfig(simulations=6, c_puct=1.0))
    assert search.run(np.zeros((1, 1), np.int8)).visits.tolist() == [[4, 2]]


def test_ucb1_tries_every_move_before_it_repeats_one():
    search = Search(Endless(), constant([0.99, 0.01], 0.0), SearchConfig(simulations=2, rule="ucb1"))
    assert search.run(np.zeros((1, 1), np.int8)).visits.tolist() == [[1, 1]]


def test_values_change_sign_with_the_player():
    # Every position is judged +.5 for who is to move, so a first move is worth -.5 to who makes it.
    one = Search(Endless(), constant([0.5, 0.5], 0.5), SearchConfig(simulations=1)).run(np.zeros((1, 1), np.int8))
    assert one.values.tolist() == [-0.5]


@pytest.mark.parametrize(
    ("board", "best"),
    [
        ([1, 1, 0, -1, -1, 0, 0, 0, 0], 2),  # complete the row
        ([1, 0, 0, -1, -1, 0, 0, 1, 0], 5),  # stop the opponent's
    ],
    ids=["win", "block"],
)
def test_search_sees_what_is_one_move_away(board, best):
    game = TicTacToe()
    found = Search(game, uniform(game), SearchConfig(simulations=200)).run(np.array([board], np.int8))
    assert found.best()[0] == best
    assert found.visits.sum() == 200
    assert (found.visits[0][np.array(board) != 0] == 0).all()


def test_games_searched_together_do_not_touch_each_other():
    game = ConnectFour()
    network = AlphaZero("connect_four", seed=3).network
    torch.nn.init.normal_(network.policy_head.weight, std=0.05)
    torch.nn.init.normal_(network.value_head.weight, std=0.5)
    boards = game.initial(3)
    for column in (3, 3, 2):
        boards[1:] = game.play(boards[1:], np.full(2, column)).boards
    boards[2] = game.play(boards[2:], np.array([5])).boards[0]
    search = Search(game, network.evaluate, SearchConfig(simulations=40))
    together = search.run(boards).visits
    alone = np.concatenate([search.run(boards[index : index + 1]).visits for index in range(3)])
    np.testing.assert_array_equal(together, alone)


def test_noise_is_mixed_into_the_priors_of_legal_moves_only():
    game = TicTacToe()
    search = Search(game, uniform(game), SearchConfig(noise_fraction=0.25), generator=np.random.default_rng(0))
    boards = np.array([[1, -1, 0, 0, 0, 0, 0, 0, 0]] * 4000, np.int8)
    priors, _ = search._judge(boards)
    np.testing.assert_allclose(priors[0], [0, 0, *[1 / 7] * 7])
    noisy = search._with_noise(priors, boards)
    np.testing.assert_allclose(noisy.sum(axis=1), 1.0)
    assert (noisy[:, :2] == 0).all()
    np.testing.assert_allclose(noisy[:, 2:].mean(axis=0), 1 / 7, atol=0.003)
    # Dirichlet(1) over 7: variance (1/7)(6/7)/8 = .0153, times .25 squared.
    assert noisy[:, 2:].var() == pytest.approx(0.25**2 * 6 / 49 / 8, rel=0.05)


def test_outcomes_alternate_from_the_winner_back():
    agent = AlphaZero("tictactoe", self_play=SelfPlayConfig(games=1, search=SearchConfig(simulations=2)))
    agent.self_play.plies[0] = 5
    np.testing.assert_array_equal(agent.self_play._harvest(0, won=True).outcomes, [1, -1, 1, -1, 1])
    agent.self_play.plies[0] = 9
    np.testing.assert_array_equal(agent.self_play._harvest(0, won=False).outcomes, np.zeros(9))


def test_the_window_keeps_the_latest():
    window = Window(TicTacToe(), capacity=4)
    for start in (0, 3):
        outcomes = np.arange(start, start + 3, dtype=np.float32)
        window.add(Positions(np.zeros((3, 9), np.int8), np.full((3, 9), 1 / 9, np.float32), outcomes))
    drawn = window.sample(200, generator=np.random.default_rng(0)).outcomes
    assert set(drawn.tolist()) == {2, 3, 4, 5}


def test_samples_are_turned_with_their_policies():
    window = Window(TicTacToe(), capacity=1)
    board = np.array([[1, 0, 0, 0, 0, -1, 0, 0, 0]], np.int8)
    policy = np.zeros((1, 9), np.float32)
    policy[0, 1] = 1.0  # next to the mover's corner stone, away from the other's
    window.add(Positions(board, policy, np.ones(1, np.float32)))
    drawn = window.sample(100, generator=np.random.default_rng(0))
    assert len(np.unique(drawn.boards, axis=0)) == 8
    for turned, target in zip(drawn.boards.reshape(-1, 3, 3), drawn.policies.reshape(-1, 3, 3), strict=True):
        stone, move = np.argwhere(turned == 1)[0], np.argwhere(target == 1)[0]
        assert sorted(stone % 2) == [0, 0], "a corner"
        assert np.abs(stone - move).sum() == 1, "its neighbour"
        assert np.abs(np.argwhere(turned == -1)[0] - move).sum() == 2


def small_agent(seed: int = 0) -> AlphaZero:
    self_play = SelfPlayConfig(games=8, moves_per_iteration=9, search=SearchConfig(simulations=8))
    return AlphaZero("tictactoe", self_play=self_play, learning=LearningConfig(updates_per_iteration=4), seed=seed)


def test_a_loaded_state_goes_on_bit_by_bit():
    whole, part = small_agent(), small_agent()
    for _ in range(4):
        expected = whole.iterate()
    for _ in range(2):
        part.iterate()
    resumed = small_agent(seed=9)
    resumed.load_state_dict(part.state_dict())
    for _ in range(2):
        metrics = resumed.iterate()
    assert metrics == expected
    for name, weights in whole.network.state_dict().items():
        assert torch.equal(weights, resumed.network.state_dict()[name]), name


def test_the_loss_is_the_papers():
    agent = small_agent()
    agent.iterate()
    state = agent.generator.bit_generator.state
    batch = agent.window.sample(256, generator=agent.generator)
    agent.generator.bit_generator.state = state
    priors, values = agent.network.evaluate(batch.boards)
    policy_loss, value_loss = agent.update()
    assert float(policy_loss) == pytest.approx(-(batch.policies * np.log(priors)).sum(1).mean(), rel=1e-5)
    assert float(value_loss) == pytest.approx(((batch.outcomes - values) ** 2).mean(), rel=1e-5)


def test_a_saved_network_judges_alike(tmp_path):
    agent = small_agent()
    agent.iterate()
    agent.network.save(tmp_path, name="tictactoe")
    boards = agent.self_play.boards
    for ours, loaded in zip(agent.network.evaluate(boards), load_network(tmp_path).evaluate(boards), strict=True):
        np.testing.assert_array_equal(ours, loaded)
    (tmp_path / "network.json").write_text("{}")
    with pytest.raises(ModelError, match="not a saved network"):
        load_network(tmp_path)


@pytest.mark.slow
def test_tictactoe_is_learnt_until_nobody_wins_against_it():
    search = SearchConfig(simulations=24, c_puct=3.0)
    self_play = SelfPlayConfig(moves_per_iteration=9, temperature_moves=6, search=search)
    agent = AlphaZero("tictactoe", self_play=self_play)

    def worst() -> list[int]:
        """Against every possible opponent, moving first and second; without noise the player is deterministic."""
        return [worst_outcome(agent.game, agent.player(simulations=128), moves_first=first) for first in (True, False)]

    assert worst() == [-1, -1], "the same search with an untrained network is beaten"
    for _ in range(8):
        agent.iterate()
    assert worst() == [0, 0]
