"""Playing: a batch of text episodes, turn by turn, as tokens.

An episode is one growing list of token ids. The policy's tokens enter it as the generator drew them, the
environment's as the chat template prints them; neither is ever read back from text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.collation import left_pad
from rlhf.data.records import Message
from rlhf.data.tokenization import decode_completion, encode_prompt
from rlhf.data.turns import following_ids
from rlhf.lm.generation import Generator
from rlhf.lm.sampling import SamplingConfig
from rlhf.lm.text_environments import TextEnvironment, first_messages, take_step


@dataclass
class Episode:
    """One conversation; `token_ids`, `own`, `rewards` and `log_probs` have one entry per token after the prompt."""

    environment: TextEnvironment
    messages: list[Message]
    """All that was said so far, for people."""
    prompt_ids: list[int]
    """What stood there before the policy's first turn."""
    group: int = 0
    """Episodes of one group began with the same seed."""
    token_ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    """True where the policy drew the token."""
    rewards: list[float] = field(default_factory=list)
    """Of a turn, on the turn's last token of the policy."""
    log_probs: list[float] = field(default_factory=list)
    """As the generator reported them, 0 for the environment's tokens."""
    trailing_ids: list[int] = field(default_factory=list)
    """What a truncated episode would have gone on with; read for the value of its last state only."""
    turns: int = 0
    cut_turns: int = 0
    """Turns cut at the limit of a turn's tokens, which the environment judged as they were."""
    terminated: bool = False
    truncated: bool = False
    out_of_room: bool = False
    """Truncated by us, since one more turn might not have fitted."""

    @property
    def over(self) -> bool:
        """Whether the policy has nothing more to say."""
        return self.terminated or self.truncated

    @property
    def score(self) -> float:
        """Undiscounted sum of the rewards."""
        return sum(self.rewards)


def begin_episode(
    environment: TextEnvironment, tokenizer: PreTrainedTokenizerBase, *, seed: int, group: int = 0
) -> Episode:
    """Reset an environment and tokenize what it says.

    Raises:
        DataError: The template refuses the conversation.
        ModelError: The tokenizer has no chat template.
        RewardError: The environment broke its protocol.
    """
    messages = first_messages(environment, seed=seed)
    return Episode(environment, messages, encode_prompt(tokenizer, messages, where="text environment"), group)


def play_episodes(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    episodes: Sequence[Episode],
    *,
    sampling: SamplingConfig,
    max_episode_length: int,
    rows_per_batch: int | None = None,
    device: torch.device | str = "cpu",
    random: torch.Generator | None = None,
) -> None:
    """Play episodes to their ends; those that are still running take each turn together.

    The conversation is read anew each turn: keys and values are not kept from one turn to the next.

    Args:
        generator: Writes the policy's turns.
        tokenizer: Of the policy.
        episodes: Begun, changed in place.
        sampling: `max_completion_length` is the limit of one turn.
        max_episode_length: Tokens after the prompt. An episode without room for one more whole turn is truncated.
        rows_per_batch: Episodes at once; bounds the memory of the cache. None: all.
        device: Where token ids are put.
        random: Source of randomness; None uses torch's global one.

    Raises:
        DataError: A conversation and a turn exceed the model's context.
        RewardError: An environment broke its protocol.
    """
    running = [episode for episode in episodes if not episode.over]
    while running:
        for start in range(0, len(running), rows_per_batch or len(running)):
            batch = running[start : start + (rows_per_batch or len(running))]
            pad_id = tokenizer.pad_token_id
            assert isinstance(pad_id, int), "require_special_tokens runs before any sampling"
            ids, mask = left_pad([episode.prompt_ids + episode.token_ids for episode in batch], pad_id)
            drawn = generator.generate(ids.to(device), mask.to(device), sampling=sampling, generator=random)
            room = max_episode_length - sampling.max_completion_length
            columns = (drawn.completion_ids, drawn.completion_mask, drawn.sampling_log_probs, drawn.ended)
            for episode, (tokens, log_probs, ended) in zip(batch, _rows(*columns), strict=True):
                _take_turn(episode, tokenizer, tokens, log_probs=log_probs, ended=ended, room=room)
        running = [episode for episode in running if not episode.over]


def _rows(ids: Tensor, mask: Tensor, log_probs: Tensor, ended: Tensor) -> Iterator[tuple[list[int], list[float], bool]]:
    """The drawn tokens of each row, without padding."""
    lengths = mask.sum(dim=1).tolist()
    for row, count, numbers, end in zip(ids.tolist(), lengths, log_probs.tolist(), ended.tolist(), strict=True):
        yield row[:count], numbers[:count], end


def _take_turn(
    episode: Episode,
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[int],
    *,
    log_probs: list[float],
    ended: bool,
    room: int,
) -> None:
    """Append one turn of the policy and, if the episode goes on, what the environment answers."""
    said = decode_completion(tokenizer, tokens)
    messages, reward, terminated, truncated = take_step(episode.environment, said)
    episode.turns += 1
    episode.cut_turns += not ended
    episode.messages += [{"role": "assistant", "content": said}, *messages]
    episode.token_ids += tokens
    episode.log_probs += log_probs
    episode.own += [True] * len(tokens)
    episode.rewards += [0.0] * (len(tokens) - 1) + [reward]
    episode.terminated = terminated
    if terminated:
        return
    answer = following_ids(tokenizer, messages, ended=ended)
    episode.out_of_room = not truncated and len(episode.token_ids) + len(answer) > room
    if truncated or episode.out_of_room:
        episode.truncated, episode.trailing_ids = True, answer
        return
    episode.token_ids += answer
    episode.own += [False] * len(answer)
    episode.rewards += [0.0] * len(answer)
    episode.log_probs += [0.0] * len(answer)
