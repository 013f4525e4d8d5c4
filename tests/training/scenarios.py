"""What the two-process test trains: the same function makes the rows of one process of two, or of one alone."""

from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from small_worlds import (
    ActorCritic,
    concatenate,
    make_experience,
    make_language_experience,
    tiny_language_policy,
    without_rows,
)

from rlhf.core.algorithm import AlgorithmConfig, Imitation
from rlhf.core.presets import ALGORITHMS
from rlhf.training.learner import Learner
from rlhf.training.update_config import UpdateConfig


@dataclass(frozen=True)
class Scenario:
    algorithm: AlgorithmConfig
    update: UpdateConfig
    language: bool = False
    rows: tuple[int, int] = (8, 8)
    imitates: bool = False
    critic_only: bool = False


def change(name, **changes):
    return ALGORITHMS[name].model_copy(update=changes)


SCENARIOS = {
    "gym_ddp": Scenario(change("ppo", entropy_coef=0.01), UpdateConfig(learning_rate=1e-2)),
    "gym_flat_actions": Scenario(
        change("ppo"), UpdateConfig(learning_rate=1e-2, shuffle="actions", flatten_parameters=True), rows=(5, 9)
    ),
    # The critic exists but nothing trains it: DDP must not wait for its gradients.
    "gym_unused_critic": Scenario(change("grpo"), UpdateConfig(learning_rate=1e-2, microbatch_rows=2), rows=(4, 7)),
    # 3 and 11 rows: some minibatches lie wholly on one process.
    "gym_uneven": Scenario(change("gspo", minibatches=7), UpdateConfig(learning_rate=1e-2), rows=(3, 11)),
    "gym_early_stop": Scenario(
        change("ppo", epochs=8, minibatches=1), UpdateConfig(learning_rate=1e-2, target_kl=0.03)
    ),
    "language_tokens": Scenario(
        change("ppo_rlhf", minibatches=2), UpdateConfig(learning_rate=1e-2, microbatch_tokens=20), True, (5, 7)
    ),
    # Three texts of one process against one of the other: the denominator is the minibatch's, over both.
    "language_ptx": Scenario(
        change("ppo_rlhf", epochs=2), UpdateConfig(learning_rate=1e-2, microbatch_rows=3), True, (5, 7), imitates=True
    ),
    "language_critic_warmup": Scenario(
        change("ppo_rlhf", epochs=2), UpdateConfig(learning_rate=1e-2), True, (5, 7), critic_only=True
    ),
    "language_flat": Scenario(
        change("grpo", epochs=2),
        UpdateConfig(learning_rate=1e-2, microbatch_rows=3, flatten_parameters=True),
        True,
        (5, 7),
    ),
}


def shards(scenario):
    """The rows of process 0 and of process 1."""
    make = make_language_experience if scenario.language else make_experience
    both = [make(rows, seed=seed) for seed, rows in enumerate(scenario.rows)]
    both[1] = replace(both[1], action_mask=both[1].action_mask & (torch.arange(both[1].action_mask.shape[1]) > 0))
    return [without_rows(rows) for rows in both] if scenario.update.shuffle == "actions" else both


def train(scenario, *, rank, accelerator=None):
    """Two updates; rank None is one process with all rows. Returns weights and the last metrics."""
    # Other processes start from other weights: those of process 0 must win.
    policy = tiny_language_policy(seed=rank or 0) if scenario.language else ActorCritic(seed=rank or 0)
    mixed = make_imitation(accelerator) if scenario.imitates else None
    learner = Learner(policy, scenario.algorithm, scenario.update, accelerator=accelerator, seed=3, mixed=mixed)
    parts = shards(scenario)
    experience = concatenate(*parts) if rank is None else parts[rank]
    for _ in range(2):
        metrics = learner.update(experience, kl_coef=0.1, critic_only=scenario.critic_only)
    return {name: tensor.detach().clone() for name, tensor in policy.state_dict().items()}, metrics


def make_imitation(accelerator):
    """Four texts a minibatch, of very different lengths, over tokens 0 to 10."""
    from rlhf.data.records import Demonstration
    from rlhf.lm.loading import character_tokenizer
    from rlhf.lm.ptx import ImitationLoss, PtxConfig

    tokenizer = character_tokenizer("abcdefgh")
    texts = [Demonstration("a", "b" * length) for length in (1, 9, 2, 7, 3, 5)]
    config = PtxConfig(coefficient=0.7, batch_size=4, microbatch_size=1)
    return ImitationLoss(texts, tokenizer=tokenizer, config=config, accelerator=accelerator)


def credited(*, rank, accelerator=None):
    """What `estimate` makes of rows spread unevenly over two processes: advantages standardized over the whole
    rollout, and factors of imitation, [2, B, T]."""
    from small_worlds import GuessingGame

    from rlhf.core.estimate import estimate
    from rlhf.training.distributed import make_reduce

    rollouts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        rollout = GuessingGame(ActorCritic(seed=0)).collect()
        mask = torch.rand(rollout.action_mask.shape) < (0.9 if seed else 0.4)
        rollouts.append(replace(rollout, action_mask=mask | rollout.action_mask.cumsum(1).eq(1)))
    reduce = {} if rank is None else {"reduce": make_reduce(accelerator)}
    names = ("actions", "action_mask", "rewards", "old_log_probs", "episode_ends", "values", "ref_log_probs")
    both = replace(
        rollouts[0],
        inputs={"observations": torch.cat([part.inputs["observations"] for part in rollouts])},
        group_ids=torch.cat([part.group_ids for part in rollouts]),
        **{name: torch.cat([getattr(part, name) for part in rollouts]) for name in names},
    )
    algorithm = change("ppo_rlhf", imitation=Imitation(above=0.2))
    found = estimate(both if rank is None else rollouts[rank], algorithm, kl_coef=0.1, **reduce)
    return torch.stack([found.advantages, found.imitation])


def run_whole_and_resumed(folder, accelerator):
    """A run of 5 iterations, and one that was stopped after the fourth and resumed from the third."""
    from small_worlds import GuessingGame

    from rlhf.config import Config
    from rlhf.errors import ConfigError
    from rlhf.training import Run, RunConfig, optimize_policy

    class Recipe(Config):
        iterations: int = 5

    class Stopping(GuessingGame):
        def collect(self):
            if self.collected == 4:
                raise KeyboardInterrupt
            return super().collect()

    def train_in(name, kind=GuessingGame, **settings):
        config = RunConfig(directory=f"{folder}/{name}", checkpoint_every=3, **settings)
        run = Run(config, resolved=Recipe(), iterations=5, accelerator=accelerator)
        policy = ActorCritic(seed=1)
        learner = Learner(policy, change("ppo_kl"), UpdateConfig(learning_rate=1e-2), accelerator=accelerator)
        collector = kind(policy)
        optimize_policy(collector, learner, run)
        return policy.state_dict(), collector.collected

    whole, _ = train_in("whole")
    refused = False
    try:
        train_in("whole")
    except ConfigError:
        refused = True
    with suppress(KeyboardInterrupt):
        train_in("parts", Stopping)
    parts, collected = train_in("parts", resume=True)
    return {"whole": dict(whole), "parts": dict(parts), "collected": collected, "refused": refused}
