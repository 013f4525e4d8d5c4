"""One face for everything tabular: methods that know the process, and methods that learn from steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import gymnasium
import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from classic_rl.spaces import space_to_json
from classic_rl.tabular.control import (
    ControlLearner,
    DynaQ,
    ExpectedSarsa,
    ModelBased,
    MonteCarlo,
    QLearning,
    Sarsa,
)
from classic_rl.tabular.dynamic_programming import (
    Solution,
    action_values,
    expected_return,
    finite_horizon_optimum,
    policy_iteration,
    value_iteration,
)
from classic_rl.tabular.linear import LinearLearner, LinearQLearning
from classic_rl.tabular.mdp import TabularMdp, load_mdp
from rlhf.config import Config


class TabularEnvironment(Config):
    """Which environment."""

    id: str
    """A toy-text id such as FrozenLake-v1; linear_q_learning takes any id with Discrete actions."""
    kwargs: dict[str, Any] = {}
    """Passed to the environment, such as is_slippery."""
    max_steps: int | None = Field(None, ge=1)
    """Where episodes are cut, in learning and in evaluation; null takes the environment's own limit."""


class ValueIteration(Config):
    """Back up all states until nothing moves (Bellman 1957)."""

    type: Literal["value_iteration"] = "value_iteration"
    discount: float = Field(0.99, ge=0, le=1)
    """gamma."""
    tolerance: float = Field(1e-10, gt=0)
    """Largest change of a value in the last sweep."""


class PolicyIteration(Config):
    """Evaluate exactly, improve greedily (Howard 1960)."""

    type: Literal["policy_iteration"] = "policy_iteration"
    discount: float = Field(0.99, ge=0, le=1)
    """gamma."""


Planner = ValueIteration | PolicyIteration
Algorithm = (
    ValueIteration
    | PolicyIteration
    | QLearning
    | Sarsa
    | ExpectedSarsa
    | MonteCarlo
    | DynaQ
    | ModelBased
    | LinearQLearning
)


class Solver(Protocol):
    """What the recipe drives."""

    learns: bool
    """False: everything happens in the first `advance`."""

    def advance(self, steps: int) -> dict[str, float]:
        """Go on until `steps` steps are made in all."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Judge the greedy policy."""
        ...

    def save(self, file: Path) -> None:
        """Write the values."""
        ...

    def policy_description(self) -> dict[str, Any]:
        """What `classic_rl.tabular.policy` needs beside the tensors."""
        ...

    def policy_tensors(self) -> dict[str, Tensor]:
        """What acting needs."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What going on needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        ...


def make_solver(environment: TabularEnvironment, algorithm: Algorithm, *, total_steps: int, seed: int = 0) -> Solver:
    """Return what solves `environment` by `algorithm`.

    Raises:
        ConfigError: An environment that cannot be made, or does not tell its dynamics.
    """
    if isinstance(algorithm, LinearQLearning):
        made = gymnasium.make(environment.id, max_episode_steps=environment.max_steps, **environment.kwargs)
        return LinearSolver(LinearLearner(made, algorithm, total_steps=total_steps, seed=seed))
    mdp = load_mdp(environment.id, kwargs=environment.kwargs, max_steps=environment.max_steps)
    if isinstance(algorithm, ValueIteration):
        return PlannedSolver(
            mdp, lambda: value_iteration(mdp, discount=algorithm.discount, tolerance=algorithm.tolerance), algorithm
        )
    if isinstance(algorithm, PolicyIteration):
        return PlannedSolver(mdp, lambda: policy_iteration(mdp, discount=algorithm.discount), algorithm)
    return LearnedSolver(ControlLearner(mdp, algorithm, total_steps=total_steps, seed=seed))


def judge(mdp: TabularMdp, policy: np.ndarray) -> dict[str, float]:
    """Exact expected returns, undiscounted and within the environment's limit: of a policy, and the best there is."""
    measured = {"return_mean": expected_return(mdp, policy)} if mdp.limit is not None else {}
    if mdp.limit is not None:
        measured["optimal_return"] = float(mdp.start @ finite_horizon_optimum(mdp, horizon=mdp.limit)[0])
    return measured


class PlannedSolver:
    """Knows the process."""

    learns, replicated = False, True

    def __init__(self, mdp: TabularMdp, solve: Callable[[], Solution], config: Planner) -> None:
        self.mdp, self.config, self._solve = mdp, config, solve
        self.solution: Solution | None = None

    def advance(self, steps: int) -> dict[str, float]:
        """Solve; no step is made."""
        self.solution = self._solve()
        return {"sweeps": float(self.solution.iterations)}

    def evaluate(self) -> dict[str, float]:
        """Exact returns, and the discounted value of the start."""
        assert self.solution is not None
        start_value = float(self.mdp.start @ self.solution.values)
        return {"discounted_value": start_value, **judge(self.mdp, self.solution.policy)}

    def save(self, file: Path) -> None:
        """`values` [S], `action_values` [S, A], `policy` [S, A]."""
        assert self.solution is not None
        np.savez(file, values=self.solution.values, action_values=self._action_values(), policy=self.solution.policy)

    def _action_values(self) -> np.ndarray:
        assert self.solution is not None
        return action_values(self.mdp, self.solution.values, discount=self.config.discount)

    def policy_description(self) -> dict[str, Any]:
        """A table."""
        return {"type": "table"}

    def policy_tensors(self) -> dict[str, Tensor]:
        """`policy` and `action_values`, [S, A]."""
        assert self.solution is not None
        return _tensors(policy=self.solution.policy, action_values=self._action_values())

    def state_dict(self) -> dict[str, Any]:
        """The solution."""
        assert self.solution is not None
        return self.solution._asdict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the solution."""
        self.solution = Solution(**state)


class LearnedSolver:
    """Learns from steps in a table."""

    learns, replicated = True, True

    def __init__(self, learner: ControlLearner) -> None:
        self.learner = learner

    def advance(self, steps: int) -> dict[str, float]:
        """Learn until `steps` are made."""
        return self.learner.learn(steps - self.learner.steps)

    def evaluate(self) -> dict[str, float]:
        """Exact returns of the greedy policy: no episode is played."""
        return judge(self.learner.mdp, self.learner.policy)

    def save(self, file: Path) -> None:
        """`action_values` [S, A], `policy` [S, A]."""
        np.savez(file, action_values=self.learner.action_values, policy=self.learner.policy)

    def policy_description(self) -> dict[str, Any]:
        """A table."""
        return {"type": "table"}

    def policy_tensors(self) -> dict[str, Tensor]:
        """`policy` and `action_values`, [S, A]."""
        return _tensors(policy=self.learner.policy, action_values=self.learner.action_values)

    def state_dict(self) -> dict[str, Any]:
        """The learner's."""
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The learner's."""
        self.learner.load_state_dict(state)


class LinearSolver:
    """Learns weights of features from steps."""

    learns, replicated = True, True

    def __init__(self, learner: LinearLearner, *, episodes: int = 20) -> None:
        self.learner, self.episodes = learner, episodes

    def advance(self, steps: int) -> dict[str, float]:
        """Learn until `steps` are made."""
        return self.learner.learn(steps - self.learner.steps)

    def evaluate(self) -> dict[str, float]:
        """Greedy episodes."""
        return self.learner.play(self.episodes)

    def save(self, file: Path) -> None:
        """`weights` [A, F]."""
        np.savez(file, weights=self.learner.weights)

    def policy_description(self) -> dict[str, Any]:
        """Features and spaces."""
        return {
            "type": "linear",
            "algorithm": self.learner.config.model_dump(mode="json"),
            "observation_space": space_to_json(self.learner.environment.observation_space),
            "action_space": space_to_json(self.learner.environment.action_space),
        }

    def policy_tensors(self) -> dict[str, Tensor]:
        """`weights` [A, F]."""
        return _tensors(weights=self.learner.weights)

    def state_dict(self) -> dict[str, Any]:
        """The learner's."""
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The learner's."""
        self.learner.load_state_dict(state)


def _tensors(**arrays: np.ndarray) -> dict[str, Tensor]:
    return {name: torch.tensor(array) for name, array in arrays.items()}
