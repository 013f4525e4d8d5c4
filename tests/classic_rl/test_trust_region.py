"""TRPO and its relatives: the constraint, improvement, fallback, the dual variable, resume, learning."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from classic_rl.collector import CollectSteps
from classic_rl.divergence import describe
from classic_rl.environments import EnvironmentConfig
from classic_rl.evaluation import EvaluationConfig, evaluate
from classic_rl.natural_gradient import FisherProduct, actor_parameters
from classic_rl.policy import ActorCritic
from classic_rl.saving import load
from classic_rl.trust_region import (
    CriticUpdate,
    NaturalGradient,
    Trpo,
    TrpoDual,
    TrustRegionLearner,
    _Surrogate,
    shared_algorithm,
)
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config
from rlhf.core.algorithm import Gae
from rlhf.core.estimate import estimate
from rlhf.core.kl import make_kl_coefficient
from rlhf.core.types import Experience
from rlhf.errors import ConfigError, TrainingError

CONFIGS = {
    "natural_gradient": NaturalGradient(damping=0.01),
    "trpo": Trpo(damping=0.01),
    "trpo_dual": TrpoDual(learning_rate=1e-2),
}


def make_experience(policy, *, states=256, seed=1):
    """States, the policy's own actions, random credit; some actions masked, whose numbers are absurd."""
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(4, states // 4, 3, generator=generator)
    noise = np.random.default_rng(seed)
    distribution = policy.distribution
    outputs = policy.actor(observations).detach()
    flat = outputs.flatten(0, 1).numpy()
    actions = torch.from_numpy(distribution.sample(flat, distribution.noise(noise, (len(flat),))))
    actions = actions.view(4, states // 4, *distribution.action_shape)
    log_probs = distribution.log_probs_and_entropy(outputs, actions)[0].detach()
    advantages = torch.randn(log_probs.shape, generator=generator)
    mask = torch.rand(log_probs.shape, generator=generator) < 0.9
    return Experience(
        inputs={"observations": torch.where(mask.unsqueeze(-1), observations, 1e3)},
        actions=actions,
        action_mask=mask,
        old_log_probs=log_probs,
        advantages=torch.where(mask, advantages, 0.0),
        returns=torch.where(mask, observations.sum(-1), 0.0),
        old_values=torch.zeros_like(log_probs),
    )


def make_policy(space=None, *, seed=0):
    return ActorCritic(gymnasium.spaces.Box(-1, 1, (3,)), space or gymnasium.spaces.Discrete(3), seed=seed)


def measure(policy, experience, old):
    """Surrogate and KL by torch's own distributions, over unmasked actions."""
    mask = experience.action_mask
    observations = experience.inputs["observations"][mask]
    with torch.no_grad():
        new = policy.actor(observations)
        log_probs = torch.distributions.Categorical(logits=new).log_prob(experience.actions[mask])
        ratio = torch.exp(log_probs - experience.old_log_probs[mask])
        kl = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=old), torch.distributions.Categorical(logits=new)
        )
    return (ratio * experience.advantages[mask]).mean().item(), kl.mean().item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_kl", [1e-3, 0.01, 0.1])
def test_trpo_improves_the_surrogate_within_the_region(seed, max_kl):
    policy = make_policy(seed=seed)
    experience = make_experience(policy, seed=seed)
    mask = experience.action_mask
    old = policy.actor(experience.inputs["observations"][mask]).detach()
    metrics = TrustRegionLearner(policy, Trpo(max_kl=max_kl, damping=1e-3)).update(experience)
    surrogate, kl = measure(policy, experience, old)
    before = experience.advantages[mask].mean().item()
    assert metrics["step_accepted"] == 1
    assert max_kl / 20 < kl <= max_kl * (1 + 1e-4)
    assert surrogate > before
    assert metrics["kl_to_old_after"] == pytest.approx(kl, rel=1e-4)
    assert metrics["surrogate_gain"] == pytest.approx(surrogate - before, abs=1e-6)


def test_the_line_search_takes_the_longest_try_that_passes():
    """Steps of 1, 1/2, 1/4 ... times the natural one: the one taken passes, the one before it did not."""
    policy = make_policy()
    with torch.no_grad():  # confident in places, so that the KL is far from quadratic
        policy.actor.layers[-1].weight *= 300
    experience = make_experience(policy)
    twin = copy.deepcopy(policy)
    config = Trpo(max_kl=0.5, damping=1e-4, shrink=0.5)
    metrics = TrustRegionLearner(policy, config).update(experience)
    tries = int(metrics["line_search_tries"])
    assert tries > 1
    assert metrics["step_accepted"] == 1
    assert metrics["kl_to_old_after"] <= 0.5
    mask = experience.action_mask
    old = twin.actor(experience.inputs["observations"][mask]).detach()
    start, end = (torch.cat([p.detach().reshape(-1) for p in actor_parameters(p_)]) for p_ in (twin, policy))
    torch.nn.utils.vector_to_parameters(start + 2 * (end - start), actor_parameters(twin))
    surrogate, kl = measure(twin, experience, old)
    assert kl > 0.5 or surrogate <= experience.advantages[mask].mean().item()


def test_a_failed_line_search_keeps_the_old_policy():
    """Tianshou's TRPO kept the last rejected step until 2.0.1 (its issue 1287)."""
    policy = make_policy()
    experience = make_experience(policy)
    learner = TrustRegionLearner(policy, Trpo(max_tries=3))
    before = [parameter.detach().clone() for parameter in actor_parameters(policy)]
    critic = policy.critic.layers[0].weight.detach().clone()

    class Hopeless:  # every step is measured as worse
        def __getattr__(self, name):
            return getattr(learner_objective, name)

        def __call__(self, output, rows, **settings):
            sums = learner_objective(output, rows, **settings)
            return sums if torch.is_grad_enabled() else sums._replace(policy=sums.policy + 1e6)

    learner_objective = learner._objective
    learner._objective = Hopeless()
    metrics = learner.update(experience)
    assert metrics["step_accepted"] == 0
    assert metrics["line_search_tries"] == 3
    assert metrics["kl_to_old_after"] == pytest.approx(0, abs=1e-7)
    for parameter, kept in zip(actor_parameters(policy), before, strict=True):
        assert torch.equal(parameter, kept)
    assert not torch.equal(critic, policy.critic.layers[0].weight), "the critic learns all the same"


def test_without_advantages_nothing_moves():
    policy = make_policy()
    experience = make_experience(policy)
    experience = dataclasses.replace(experience, advantages=torch.zeros_like(experience.advantages))
    before = [parameter.detach().clone() for parameter in actor_parameters(policy)]
    for config in (Trpo(), NaturalGradient()):
        assert TrustRegionLearner(policy, config).update(experience)["step_accepted"] == 0
        assert all(torch.equal(a, b) for a, b in zip(actor_parameters(policy), before, strict=True))


@pytest.mark.parametrize(
    "space", [gymnasium.spaces.Discrete(3), gymnasium.spaces.MultiDiscrete([2, 3]), gymnasium.spaces.Box(-1, 1, (2,))]
)
def test_the_natural_gradient_moves_by_the_kl_it_was_asked_for(space):
    """1/2 s^T (F + damping) s is max_kl by construction; a small step's KL is 1/2 s^T F s to second order."""
    policy = make_policy(space)
    experience = make_experience(policy, states=512)
    product = FisherProduct(policy, experience.inputs["observations"][experience.action_mask])
    before = torch.cat([parameter.detach().reshape(-1) for parameter in actor_parameters(policy)])
    metrics = TrustRegionLearner(policy, NaturalGradient(max_kl=1e-3, damping=0.1)).update(experience)
    step = torch.cat([parameter.detach().reshape(-1) for parameter in actor_parameters(policy)]) - before
    fisher = 0.5 * torch.dot(step, product(step)).item()
    assert fisher + 0.05 * torch.dot(step, step).item() == pytest.approx(1e-3, rel=1e-3)
    assert metrics["kl_to_old_after"] == pytest.approx(fisher, rel=0.1)
    assert metrics["surrogate_gain"] == pytest.approx(metrics["predicted_gain"], rel=0.1)


def test_masked_actions_change_nothing():
    """`make_experience` puts absurd observations under the mask; other absurd ones must give the same step."""
    results = []
    for filler in (1e3, -7.0):
        policy = make_policy()
        experience = make_experience(policy)
        observations = torch.where(experience.action_mask.unsqueeze(-1), experience.inputs["observations"], filler)
        experience = dataclasses.replace(experience, inputs={"observations": observations})
        TrustRegionLearner(policy, Trpo()).update(experience)
        results.append(torch.cat([p.detach().reshape(-1) for p in policy.parameters()]))
    assert torch.equal(*results)


# --- the dual variable ------------------------------------------------------------------------------------------------


def test_the_multiplier_climbs_with_the_excess_and_stops_at_0():
    # lambda <- max(0, lambda + 50 (KL - .01)): from 1, KL .05 gives 1 + 50 x .04 = 3; KL .01 keeps it;
    # KL 0 gives 3 - .5 = 2.5; six more give 2, 1.5, 1, .5, 0, and 0 again, not -.5.
    coefficient = make_kl_coefficient(shared_algorithm(TrpoDual()).kl)
    assert coefficient.value == 1
    seen = []
    for kl in (0.05, 0.01, *[0.0] * 7):
        coefficient.update(kl, episodes=1)
        seen.append(coefficient.value)
    assert seen == pytest.approx([3, 3, 2.5, 2, 1.5, 1, 0.5, 0, 0])


def test_a_larger_multiplier_keeps_the_policy_nearer():
    kls = []
    for multiplier in (0.0, 10.0, 1000.0):
        policy = make_policy()
        learner = TrustRegionLearner(policy, TrpoDual(learning_rate=1e-2, steps=30))
        kls.append(learner.update(make_experience(policy), kl_coef=multiplier)["kl_to_old_after"])
    assert kls[0] > 2 * kls[1] > 4 * kls[2]


def test_the_penalised_loss_is_surrogate_minus_multiplier_times_kl():
    """One plain step of Adam moves against the gradient of -L + lambda KL; here that gradient itself is compared."""
    policy = make_policy()
    learner = TrustRegionLearner(policy, TrpoDual())
    experience = make_experience(policy).flatten_actions()
    observations = experience.inputs["observations"].squeeze(1)
    old = describe(policy.distribution, policy.actor(experience.inputs["observations"]))
    with torch.no_grad():
        for parameter in actor_parameters(policy):
            parameter += 0.05
    surrogate = _Surrogate(learner, experience, actions=float(len(experience)))
    surrogate.old = old
    loss = surrogate.loss(3.0)[0]
    outputs = policy.actor(observations)
    log_probs = torch.distributions.Categorical(logits=outputs).log_prob(experience.actions.squeeze(1))
    gain = torch.exp(log_probs - experience.old_log_probs.squeeze(1)) * experience.advantages.squeeze(1)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=old.outputs.squeeze(1)), torch.distributions.Categorical(logits=outputs)
    )
    expected = -gain.mean() + 3.0 * kl.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(x, actor_parameters(policy)) for x in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- the critic, errors, state ----------------------------------------------------------------------------------------


def test_the_critic_takes_its_own_steps():
    policy = make_policy()
    experience = make_experience(policy)
    mask = experience.action_mask
    config = Trpo(critic=CriticUpdate(learning_rate=1e-2, epochs=60, minibatches=4))

    def error():
        with torch.no_grad():
            return (policy.values(experience.inputs["observations"]) - experience.returns)[mask].square().mean().item()

    before = error()  # returns are the sum of three standard normals: variance 3, and the critic starts near 0
    TrustRegionLearner(policy, config).update(experience)
    assert before > 2
    assert error() < 0.3


def test_the_critic_can_be_trained_alone():
    policy = make_policy()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    TrustRegionLearner(policy, Trpo()).update(make_experience(policy), critic_only=True)
    moved = {name for name, tensor in policy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith("critic.")}


def test_errors_are_told():
    space = gymnasium.spaces.Box(-1, 1, (3,))
    with pytest.raises(ConfigError, match="critic"):
        TrustRegionLearner(ActorCritic(space, gymnasium.spaces.Discrete(2), critic=False), Trpo())
    policy = make_policy()
    experience = make_experience(policy)
    advantages = experience.advantages.clone()
    advantages[experience.action_mask.nonzero()[0].tolist()[0], experience.action_mask.nonzero()[0].tolist()[1]] = (
        torch.nan
    )
    for config in CONFIGS.values():
        before = [parameter.detach().clone() for parameter in policy.parameters()]
        with pytest.raises(TrainingError, match="not finite"):
            TrustRegionLearner(policy, config).update(dataclasses.replace(experience, advantages=advantages))
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), before, strict=True))
    dual = TrustRegionLearner(make_policy(), CONFIGS["trpo_dual"]).state_dict()
    with pytest.raises(ConfigError, match=r"another algorithm\.type"):
        TrustRegionLearner(make_policy(), Trpo()).load_state_dict(dual)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("identifier", ["CartPole-v1", "Pendulum-v1"])
def test_resumed_equals_uninterrupted_and_repeated(make, tmp_path, name, identifier):
    config = CONFIGS[name].model_copy(update={"critic": CriticUpdate(epochs=2, minibatches=2)})
    algorithm = shared_algorithm(config)

    def start():
        policy, collector = make(identifier, algorithm, CollectSteps(steps=16), num_envs=2, normalize_observations=True)
        return policy, collector, TrustRegionLearner(policy, config, seed=0), make_kl_coefficient(algorithm.kl)

    def go_on(collector, learner, multiplier):
        for _ in range(2):
            experience = estimate(collector.collect(), algorithm)
            metrics = learner.update(experience, kl_coef=multiplier.value)
            multiplier.update(metrics["kl_to_old_after"], episodes=1)

    policy, *parts = start()
    go_on(*parts)
    torch.save([part.state_dict() for part in parts], tmp_path / "state.pt")
    go_on(*parts)
    other, *resumed = start()
    for part, state in zip(resumed, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    go_on(*resumed)
    again, *repeated = start()
    go_on(*repeated)
    go_on(*repeated)
    for key, tensor in policy.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
        assert torch.equal(tensor, again.state_dict()[key]), key


IDENTITY = {
    "natural_gradient": {"max_kl": 0.01},
    "trpo": {"max_kl": 0.05, "damping": 0.01},
    "trpo_dual": {"max_kl": 0.05, "learning_rate": 1e-3, "steps": 15, "dual_learning_rate": 20.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["discrete", "multi_discrete", "multi_binary", "box"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_identity_is_learned(make, name, kind):
    # Stable-Baselines3's tests/test_identity.py: a mean return above 90 of 100 over 20 episodes, gamma .4.
    common = {"advantages": Gae(discount=0.4, standardize="batch"), "critic": CriticUpdate(minibatches=4)}
    config = type(CONFIGS[name])(**common, **IDENTITY[name])
    algorithm = shared_algorithm(config)
    kwargs = {"kind": kind}
    policy, collector = make("Identity-v0", algorithm, CollectSteps(steps=64), num_envs=8, kwargs=kwargs)
    learner, multiplier = TrustRegionLearner(policy, config, seed=0), make_kl_coefficient(algorithm.kl)
    for _ in range(40):
        metrics = learner.update(estimate(collector.collect(), algorithm), kl_coef=multiplier.value)
        multiplier.update(metrics["kl_to_old_after"], episodes=1)
    environment = EnvironmentConfig(id="Identity-v0", kwargs=kwargs)
    assert evaluate(policy, environment, EvaluationConfig(max_steps=100))["return_mean"] > 90


# --- the recipe -------------------------------------------------------------------------------------------------------

RECIPE_CONFIGS = sorted((Path(__file__).resolve().parents[2] / "recipes/configs/trpo").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPE_CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs(tmp_path, path):
    recipe = import_recipe(find_recipe("trpo"))
    smaller = ["iterations=1", "collect.steps=32", "evaluation.episodes=1", "evaluation.max_steps=20"]
    config = load_config(recipe.CONFIG, path, [f"run.directory={tmp_path / 'run'}", *smaller])
    try:
        environment = gymnasium.make(config.environment.id)
    except gymnasium.error.DependencyNotInstalled as missing:
        pytest.skip(str(missing))
    metrics = recipe.main(config)
    assert metrics["rows"] == config.environment.num_envs
    observation, _ = environment.reset(seed=0)
    assert environment.action_space.contains(load(tmp_path / "run/policy").predict(observation))


@pytest.mark.slow
def test_a_resumed_recipe_equals_an_uninterrupted_one(tmp_path):
    recipe = import_recipe(find_recipe("trpo"))
    path = next(path for path in RECIPE_CONFIGS if path.stem == "cartpole_dual")

    def run(folder, iterations, *more):
        overrides = [f"run.directory={tmp_path / folder}", f"iterations={iterations}", "collect.steps=64", *more]
        return recipe.main(load_config(recipe.CONFIG, path, [*overrides, "evaluation.episodes=2"]))

    straight = run("straight", 4)
    run("halves", 2)
    resumed = run("halves", 4, "run.resume=true")
    same = [name for name in straight if not name.startswith("time/")]
    assert {name: resumed[name] for name in same} == {name: straight[name] for name in same}
