"""Rankings for `benchmarks/reward_model.py`: real ones where they lie beside the checkout, else procedural ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from reward_models.collation import EncodedRanking
from reward_models.loading import prepare_tokenizer
from rlhf.data.loading import load_rankings, split_holdout
from rlhf.data.records import Ranking, dense_ranks
from rlhf.data.settings import DataConfig
from rlhf.lm.loading import character_tokenizer, load_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
ALPHABET = "abcdefghijklmnopqrstuvwxyz>"


@dataclass(frozen=True)
class Case:
    """What is compared on."""

    file: str | None
    """Of `rankings/`; None is procedural."""
    candidates: int
    """K."""
    prompts: int
    """To learn from."""
    timed_prompts: int
    """The first of them, for `speed`."""
    max_length: int
    """Tokens; longer candidates lose their end."""
    batch_prompts: int
    """Prompts of an optimizer step; TRL gets all their pairs."""
    our_passes: int = 1
    """Of ours over the rankings; TRL's is one always."""


CASES = {
    "alpaca_k4": Case("alpaca_eval_k4.jsonl.gz", 4, 96, 24, 128, 4),
    "alpaca_k9": Case("alpaca_eval_k16.jsonl.gz", 9, 16, 6, 128, 1),
    "alpaca_k9_4": Case("alpaca_eval_k16.jsonl.gz", 9, 48, 8, 128, 4),
    "alpaca_k4_twice": Case("alpaca_eval_k4.jsonl.gz", 4, 96, 24, 128, 4, our_passes=2),
    "alpaca_k9_4_twice": Case("alpaca_eval_k16.jsonl.gz", 9, 48, 8, 128, 4, our_passes=2),
    "words_k4": Case(None, 4, 128, 48, 64, 4),
    "words_k9": Case(None, 9, 40, 12, 64, 1),
}
HELD_OUT, VALIDATION = 240, 100
"""Prompts to judge on, and to choose the learning rate on."""


@dataclass(frozen=True)
class Split:
    """Disjoint rankings, and the tokenizer that reads them."""

    train: list[Ranking]
    validation: list[Ranking]
    held_out: list[Ranking]
    tokenizer: PreTrainedTokenizerBase
    batch_prompts: int
    our_passes: int


def available(names: list[str]) -> list[str]:
    """Cases whose data is here."""
    return [name for name in names if CASES[name].file is None or (SHARED / "rankings").is_dir()]


def load_case(name: str) -> Split:
    """Rankings of exactly K candidates, in three parts; equal scores tie."""
    case = CASES[name]
    if case.file is None:
        words = make_words(case.prompts + VALIDATION + HELD_OUT, case.candidates, seed=0)
        train, rest = words[: case.prompts], words[case.prompts :]
        tokenizer = prepare_tokenizer(character_tokenizer(ALPHABET))
        return Split(train, rest[:VALIDATION], rest[VALIDATION:], tokenizer, case.batch_prompts, case.our_passes)
    columns = {"completions": "responses"}
    path = str(SHARED / "rankings" / case.file)
    rankings = load_rankings(DataConfig(path=path, columns=columns, order="scores", tied="drop"))
    thinned = [thin(one, case.candidates) for one in rankings if len(one.completions) >= case.candidates]
    rest, held_out = split_holdout([one for one in thinned if not one.tied], count=HELD_OUT)
    train, validation = split_holdout(rest, count=VALIDATION)
    tokenizer = prepare_tokenizer(load_tokenizer(str(SHARED / "tokenizers" / "gpt2")))
    return Split(train[: case.prompts], validation, held_out, tokenizer, case.batch_prompts, case.our_passes)


def thin(ranking: Ranking, count: int) -> Ranking:
    """Candidates evenly spread from the best to the worst."""
    order = sorted(range(len(ranking.ranks)), key=lambda index: ranking.ranks[index])
    kept = [order[round(place * (len(order) - 1) / (count - 1))] for place in range(count)]
    texts = tuple(ranking.completions[index] for index in kept)
    return Ranking(ranking.prompt, texts, dense_ranks([ranking.ranks[index] for index in kept]))


def make_words(count: int, candidates: int, *, seed: int) -> list[Ranking]:
    """Rankings of random words of 16 to 56 letters by their share of vowels, without ties."""
    generator = random.Random(seed)
    rankings: list[Ranking] = []
    while len(rankings) < count:
        words = ["".join(generator.choices(ALPHABET[:-1], k=generator.randint(16, 56))) for _ in range(candidates)]
        shares = [sum(letter in "aeiou" for letter in word) / len(word) for word in words]
        ranking = Ranking("word>", tuple(words), dense_ranks([-share for share in shares]))
        if not ranking.tied:
            rankings.append(ranking)
    return rankings


def explode(encoded: Sequence[EncodedRanking]) -> dict[str, list[list[int]]]:
    """Every pair of different rank."""
    pairs: dict[str, list[list[int]]] = {"chosen_ids": [], "rejected_ids": []}
    for one in encoded:
        for a, b in combinations(range(len(one.ranks)), 2):
            if one.ranks[a] != one.ranks[b]:
                better, worse = (a, b) if one.ranks[a] < one.ranks[b] else (b, a)
                pairs["chosen_ids"].append(one.sequences[better])
                pairs["rejected_ids"].append(one.sequences[worse])
    return pairs
