"""How much the forms of the policy gradient vary from episode to episode, at fixed policies and along training.

The estimate of one episode is `g = sum_t d log pi(a_t|s_t) credit_t`; a rollout of N episodes averages N of them, so
its variance is `trace Cov(g) / N`. Forms estimate gradients of different lengths (a discounted return's is shorter), so
beside the trace stands the *episodes needed* until the mean's standard error is as long as the gradient itself:
`trace Cov(g) / |E g|^2`, with the bias of |mean g|^2, `trace Cov(g) / N`, taken off. A baseline from the other episodes
makes the estimates of a rollout depend on each other, by O(1/N), which is left out of account.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from classic_rl.environments import EnvironmentConfig, make_environments
from classic_rl.episodes import CollectEpisodes, EpisodeCollector
from classic_rl.policy import ActorCritic
from classic_rl.reinforce import Reinforce, ReinforceLearner, credit, episode_surrogates, shared_algorithm
from rlhf.core.types import Experience
from rlhf.training.update_config import UpdateConfig

VARIANTS: dict[str, Reinforce] = {
    "trajectory": Reinforce(credit="trajectory"),
    "trajectory - baseline": Reinforce(credit="trajectory", baseline="leave_one_out"),
    "reward to go": Reinforce(credit="reward_to_go"),
    "reward to go - baseline": Reinforce(credit="reward_to_go", baseline="leave_one_out"),
    "reward to go, gamma .99": Reinforce(credit="reward_to_go", discount=0.99),
    "gamma^t x reward to go, gamma .99": Reinforce(credit="reward_to_go", discount=0.99, discounted_state_weight=True),
}


def episode_gradients(policy: nn.Module, experience: Experience) -> Tensor:
    """[B, D]: each episode's own estimate of the policy gradient, over all parameters of the actor.

    Args:
        policy: An `ActorCritic` on the CPU.
        experience: One episode per row.
    """
    parameters = [parameter for name, parameter in policy.named_parameters() if not name.startswith("critic")]
    rows = []
    for index, length in enumerate(experience.action_mask.sum(dim=1).tolist()):
        # An episode's own steps only: a backward pass through the whole batch per episode would be N times the work.
        own = experience.select(torch.tensor([index])).flatten_actions()
        assert len(own) == length
        log_probs = policy(own.inputs, own.actions).log_probs
        surrogate = episode_surrogates(log_probs, own).sum()
        pieces = torch.autograd.grad(surrogate, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([piece.reshape(-1) for piece in pieces]))
    return torch.stack(rows)


def gradient_statistics(gradients: Tensor) -> dict[str, float]:
    """Moments of one episode's estimate.

    Args:
        gradients: [N, D], independent estimates.

    Returns:
        "variance": trace of the sample covariance; "squared_norm": |E g|^2 without bias (it may come out negative where
        N is small); "episodes_needed": their quotient, infinite where the second is not positive.
    """
    gradients = gradients.double()
    variance = gradients.var(dim=0, correction=1).sum().item()
    squared_norm = gradients.mean(dim=0).square().sum().item() - variance / len(gradients)
    needed = variance / squared_norm if squared_norm > 0 else float("inf")
    return {"variance": variance, "squared_norm": squared_norm, "episodes_needed": needed}


def make_policy(identifier: str, *, seed: int) -> ActorCritic:
    """An actor of two hidden layers of 64, without a critic."""
    probe = make_environments(EnvironmentConfig(id=identifier), num_envs=1)
    spaces = probe.single_observation_space, probe.single_action_space
    probe.close()
    return ActorCritic(*spaces, critic=False, seed=seed)


def learn_and_measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Train by one form and measure on the way; a cell of the experiment.

    Args:
        settings: "form" (a key of `VARIANTS`), "environment" (an id), "seed", "episodes" per update, "updates",
            "max_steps" of an episode, "learning_rate" of Adam, "measure_every" updates, "measured_episodes" (others
            than those trained on), "measure_all" (every form, on these same episodes, or only the one that trains).

    Returns:
        "returns": mean return of each rollout; "statistics": one record per measurement, with "update", "return",
        "forms".
    """
    name, seed = settings["form"], settings["seed"]
    policy = make_policy(settings["environment"], seed=seed)
    update = UpdateConfig(learning_rate=settings["learning_rate"], max_grad_norm=None, optimizer="adam")
    learner = ReinforceLearner(policy, VARIANTS[name], update, seed=seed)
    collector = _collector(policy, settings, episodes=settings["episodes"], seed=seed)
    judge = _collector(policy, settings, episodes=settings["measured_episodes"], seed=seed + 1_000_003)
    measured = VARIANTS if settings["measure_all"] else {name: VARIANTS[name]}
    returns, statistics = [], []
    for number in range(settings["updates"] + 1):
        if number % settings["measure_every"] == 0:
            judged = judge.collect()
            forms = {
                other: gradient_statistics(episode_gradients(policy, credit(judged, form)))
                for other, form in measured.items()
            }
            statistics.append({"update": number, "return": judged.scores.mean().item(), "forms": forms})
        if number < settings["updates"]:
            rollout = collector.collect()
            returns.append(rollout.scores.mean().item())
            learner.update(rollout)
    collector.close()
    judge.close()
    return {"returns": returns, "statistics": statistics}


def _collector(policy: ActorCritic, settings: dict[str, Any], *, episodes: int, seed: int) -> EpisodeCollector:
    environment = EnvironmentConfig(id=settings["environment"], num_envs=episodes)
    collect = CollectEpisodes(max_steps=settings["max_steps"])
    return EpisodeCollector(collect, policy, environment, shared_algorithm(Reinforce()), seed=seed)
