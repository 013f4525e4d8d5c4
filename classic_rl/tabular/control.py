"""Learning action values step by step: Q-learning, SARSA, expected SARSA, Monte Carlo, Dyna-Q, planning in a model."""

from __future__ import annotations

import random
from typing import Annotated, Any, Literal, assert_never

import numpy as np
from pydantic import Field

from classic_rl.tabular.dynamic_programming import greedy_policy
from classic_rl.tabular.exploration import LinearSchedule, choose, constant
from classic_rl.tabular.mdp import TabularMdp
from classic_rl.tabular.planning import EmpiricalModel
from classic_rl.tabular.simulation import Simulator, Step
from classic_rl.tabular.temporal_difference import returns_of
from rlhf.config import Config


class _Control(Config):
    discount: float = Field(0.99, ge=0, le=1)
    """gamma."""
    step_size: LinearSchedule = constant(0.5)
    exploration: LinearSchedule = constant(0.1)


class QLearning(_Control):
    """`Q <- Q + alpha (r + gamma max Q' - Q)`: learns the greedy policy's values whatever it does (Watkins 1989)."""

    type: Literal["q_learning"] = "q_learning"


class Sarsa(_Control):
    """`Q <- Q + alpha (r + gamma Q(s', a') - Q)`: learns the values of what it does, exploration included."""

    type: Literal["sarsa"] = "sarsa"


class ExpectedSarsa(_Control):
    """`Q <- Q + alpha (r + gamma sum pi(a|s') Q(s', a) - Q)`: SARSA without the variance of drawing a'."""

    type: Literal["expected_sarsa"] = "expected_sarsa"


class MonteCarlo(_Control):
    """`Q <- Q + alpha (G - Q)` along the whole episode, after it ended (every visit; Sutton and Barto, section 5.4)."""

    type: Literal["monte_carlo"] = "monte_carlo"


class DynaQ(_Control):
    """Q-learning, and after each step the same update on steps drawn from a learned model (Sutton 1990)."""

    type: Literal["dyna_q"] = "dyna_q"
    planning_steps: int = Field(10, ge=0)
    """Updates from the model per real step."""


class ModelBased(_Control):
    """Learn P and R by counting, solve them by value iteration, act greedily with exploration; no step size."""

    type: Literal["model_based"] = "model_based"
    plan_every: int = Field(1000, ge=1)
    """Steps between solutions of the learned model."""


Control = Annotated[QLearning | Sarsa | ExpectedSarsa | MonteCarlo | DynaQ | ModelBased, Field(discriminator="type")]


class ControlLearner:
    """Acts epsilon-greedily and learns, one step at a time.

    Randomness of a call of `learn` depends on the seed and on the steps made before, so that a restored learner goes on
    exactly as if it had not stopped.

    Attributes:
        q: `q[s][a]`, plain lists: single entries of NumPy arrays cost ten times as much.
        steps: Made so far.
    """

    replicated = True

    def __init__(self, mdp: TabularMdp, config: Control, *, total_steps: int, seed: int = 0) -> None:
        self.mdp, self.config, self.total_steps, self.seed = mdp, config, total_steps, seed
        self.simulator = Simulator(mdp)
        self.q = [[0.0] * mdp.num_actions for _ in range(mdp.num_states)]
        self.model = EmpiricalModel(mdp.num_states, mdp.num_actions)
        self.steps, self._state, self._action = 0, -1, -1
        self._episode: list[tuple[int, int, float]] = []
        self._planner = random.Random(seed)

    @property
    def action_values(self) -> np.ndarray:
        """[S, A]."""
        return np.array(self.q)

    @property
    def policy(self) -> np.ndarray:
        """[S, A], greedy."""
        return greedy_policy(self.action_values)

    def learn(self, steps: int) -> dict[str, float]:
        """Make `steps` steps; returns the metrics of the episodes that ended in them."""
        generator = np.random.default_rng((self.seed, self.steps))
        returns: list[float] = []
        lengths: list[int] = []
        if self._state < 0:
            self._state = self.simulator.first(generator.random())
        self._planner = random.Random(int(generator.integers(2**63)))
        for uniforms in generator.random((steps, 6)).tolist():
            self._step(uniforms, returns, lengths)
        metrics = {"rollout/episodes": float(len(returns)), "rollout/total_env_steps": float(self.steps)}
        if returns:
            metrics |= {"rollout/return_mean": float(np.mean(returns)), "rollout/length_mean": float(np.mean(lengths))}
        progress = self.steps / self.total_steps
        return metrics | {
            "step_size": self.config.step_size(progress),
            "exploration": self.config.exploration(progress),
        }

    def _step(self, uniforms: list[float], returns: list[float], lengths: list[int]) -> None:
        explore, choice, happens, explore_next, choice_next, begins = uniforms
        state, progress = self._state, self.steps / self.total_steps
        exploration = self.config.exploration(progress)
        # SARSA has chosen already: its target was the action that is taken now.
        action = self._action if self._action >= 0 else choose(self.q[state], exploration, explore, choice)
        following, reward, terminated = self.simulator.step(state, action, happens)
        self.steps += 1
        self._episode.append((state, action, reward))
        if isinstance(self.config, Sarsa):
            self._action = choose(self.q[following], exploration, explore_next, choice_next)
        ends = terminated or len(self._episode) == self.mdp.limit
        self._update((state, action, reward, following, terminated), exploration=exploration, ends=ends)
        self._state = following
        if ends:
            returns.append(sum(reward for _, _, reward in self._episode))
            lengths.append(len(self._episode))
            self._episode, self._action = [], -1
            self._state = self.simulator.first(begins)

    def _update(self, step: Step, *, exploration: float, ends: bool) -> None:
        state, action, reward, following, terminated = step
        config, values = self.config, self.q[following]
        match config:
            case QLearning() | DynaQ():
                bootstrap = max(values)
            case Sarsa():
                bootstrap = values[self._action]
            case ExpectedSarsa():
                # Equal best actions share 1 - epsilon, so the expectation needs only the mean and the maximum.
                bootstrap = exploration * sum(values) / len(values) + (1 - exploration) * max(values)
            case MonteCarlo():
                if ends:
                    self._average()
                return
            case ModelBased():
                self.model.add(*step)
                if self.steps % config.plan_every == 0:
                    self.q = self.model.solve(discount=config.discount).tolist()
                return
            case _:
                assert_never(config)
        rate = config.step_size((self.steps - 1) / self.total_steps)
        target = reward if terminated else reward + config.discount * bootstrap
        self.q[state][action] += rate * (target - self.q[state][action])
        if isinstance(config, DynaQ):
            self.model.add(*step)
            self._plan(config.planning_steps, rate)

    def _average(self) -> None:
        """Every-visit Monte Carlo along the episode that ended."""
        rate = self.config.step_size((self.steps - 1) / self.total_steps)
        returns = returns_of([reward for _, _, reward in self._episode], discount=self.config.discount)
        for (state, action, _), return_ in zip(self._episode, returns, strict=True):
            self.q[state][action] += rate * (return_ - self.q[state][action])

    def _plan(self, count: int, rate: float) -> None:
        """Dyna's updates, from the model instead of the environment."""
        for state, action, reward, following, terminated in self.model.draw(count, self._planner):
            target = reward if terminated else reward + self.config.discount * max(self.q[following])
            self.q[state][action] += rate * (target - self.q[state][action])

    def state_dict(self) -> dict[str, Any]:
        """Values, the model, and where the episode stands."""
        return {
            "q": self.action_values,
            "steps": self.steps,
            "state": self._state,
            "action": self._action,
            "episode": [list(step) for step in self._episode],
            "model": self.model.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.q = state["q"].tolist()
        self.steps, self._state, self._action = state["steps"], state["state"], state["action"]
        self._episode = [(int(s), int(a), float(r)) for s, a, r in state["episode"]]
        self.model.load_state_dict(state["model"])
