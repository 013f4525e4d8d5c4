"""Small policies, experiences and collectors for the tests of training, and for the scripts they start."""

import torch
from torch import nn

from rlhf.core.types import Experience, PolicyOutput, Rollout


class ActorCritic(nn.Module):
    """Two separate tanh networks over 4 numbers, 3 actions."""

    def __init__(self, *, seed=0, width=16, critic=True):
        super().__init__()
        torch.manual_seed(seed)
        self.actor = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
        self.critic = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1)) if critic else None

    def forward(self, inputs, actions):
        log_p = self.actor(inputs["observations"]).log_softmax(-1)
        log_probs = log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        values = None if self.critic is None else self.critic(inputs["observations"]).squeeze(-1)
        return PolicyOutput(log_probs, -(log_p.exp() * log_p).sum(-1), values)


class LengthAware(ActorCritic):
    """Says what its rows cost, and remembers what it was called with."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.calls = []

    def row_lengths(self, inputs, action_mask):
        return action_mask.sum(1)

    def forward(self, inputs, actions):
        self.calls.append(inputs["row"].tolist() if "row" in inputs else len(actions))
        return super().forward(inputs, actions)


def make_experience(rows=12, steps=5, *, seed=0, ragged=True, policy=None):
    """Random rows whose masks end at random lengths; old log-probs near those of `policy` where it is given."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    observations = normal(rows, steps, 4)
    actions = torch.randint(3, (rows, steps), generator=generator)
    lengths = torch.randint(1, steps + 1, (rows,), generator=generator) if ragged else torch.full((rows,), steps)
    inputs = {"observations": observations, "row": torch.arange(rows)}
    old = torch.full((rows, steps), -1.1)
    if policy is not None:
        with torch.no_grad():
            old = policy(inputs, actions).log_probs
    return Experience(
        inputs=inputs,
        actions=actions,
        action_mask=torch.arange(steps) < lengths.unsqueeze(1),
        old_log_probs=old + 0.1 * normal(rows, steps),
        advantages=normal(rows, steps),
        returns=normal(rows, steps),
        old_values=normal(rows, steps),
        ref_log_probs=old + 0.2 * normal(rows, steps),
    )


def without_rows(experience):
    """The same experience with inputs that all have a time axis, as `flatten_actions` wants them."""
    from dataclasses import replace

    return replace(experience, inputs={"observations": experience.inputs["observations"]})


class GuessingGame:
    """A collector: 6 rows of 4 guesses at the largest of 3 observed numbers; draws from the global generator."""

    def __init__(self, policy):
        self.policy, self.collected = policy, 0

    @torch.no_grad()
    def collect(self):
        self.collected += 1
        observations = torch.randn(6, 4, 4)
        log_p = self.policy.actor(observations).log_softmax(-1)
        actions = torch.distributions.Categorical(logits=log_p).sample()
        output = self.policy({"observations": observations}, actions)
        rewards = (actions == observations[..., :3].argmax(-1)).float()
        return Rollout(
            inputs={"observations": observations},
            actions=actions,
            action_mask=torch.ones(6, 4, dtype=torch.bool),
            rewards=rewards,
            old_log_probs=output.log_probs,
            episode_ends=torch.ones(6, 4, dtype=torch.bool),
            values=output.values,
            ref_log_probs=torch.full_like(output.log_probs, -1.0986),
            group_ids=torch.arange(6) // 3,
            metrics={"rollout/return_mean": rewards.mean().item()},
            samples=[{"guess": actions[0, 0].item()}],
        )

    def state_dict(self):
        return {"collected": self.collected}

    def load_state_dict(self, state):
        self.collected = state["collected"]


def tiny_language_policy(*, critic="head", seed=0):
    """A Llama of 16 x 1 over 11 tokens, with a value head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf.lm.policy import LanguageModelPolicy

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return LanguageModelPolicy(LlamaForCausalLM(config), critic=critic)


def make_language_experience(rows=10, *, seed=0):
    """Left-padded prompts up to 4 tokens and completions up to 6."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    def normal():
        return torch.randn(rows, 6, generator=generator)

    completion_mask = torch.arange(6) < integers(1, 7, rows).unsqueeze(1)
    return Experience(
        inputs={
            "prompt_ids": integers(3, 11, rows, 4),
            "prompt_mask": torch.arange(4).flip(0) < integers(1, 5, rows).unsqueeze(1),
            "completion_mask": completion_mask,
        },
        actions=integers(3, 11, rows, 6) * completion_mask,
        action_mask=completion_mask,
        old_log_probs=-2.4 + 0.1 * normal(),
        advantages=normal(),
        returns=normal(),
        old_values=normal(),
        ref_log_probs=-2.4 + 0.1 * normal(),
    )


def concatenate(first, second):
    """One process's experience that holds the rows of two."""
    joined = {
        name: torch.cat([value, getattr(second, name)])
        for name, value in vars(first).items()
        if isinstance(value, torch.Tensor)
    }
    inputs = {key: torch.cat([value, second.inputs[key]]) for key, value in first.inputs.items()}
    return Experience(inputs=inputs, **joined)
