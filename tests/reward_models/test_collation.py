"""From rankings to batches: end tokens, long texts, absent candidates."""

import pytest
import torch

from reward_models.collation import (
    RankingCollator,
    encode_candidate,
    encode_rankings,
    scatter_scores,
)
from rlhf.data.records import Ranking
from rlhf.errors import DataError


def ranking(prompt, completions, ranks, scores=None):
    return Ranking(prompt=prompt, completions=tuple(completions), ranks=tuple(ranks), scores=scores)


def test_candidate_is_prompt_completion_end(tokenizer):
    ids, overlong = encode_candidate(tokenizer, "ab>", "cd", max_length=None, truncate=False)
    # Ids of character_tokenizer: 0 pad, 1 bos, 2 eos, then the alphabet from 3: a=3 ... z=28, ">"=29.
    assert ids == [3, 4, 29, 5, 6, 2]
    assert not overlong


def test_truncation_keeps_the_end_token_and_half_of_the_room_for_the_completion(tokenizer):
    # Prompt of 6, completion of 4 letters and the end token; 8 tokens: the prompt gives up its start (after its
    # first token) down to 4, and the completion its last letter.
    ids, overlong = encode_candidate(tokenizer, "abcdef", "uvwx", max_length=8, truncate=True)
    assert overlong
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "d", "e", "f", "u", "v", "w", "<eos>"]
    # A short prompt stays whole and the completion alone is cut.
    ids, _ = encode_candidate(tokenizer, "ab", "uvwxyz", max_length=6, truncate=True)
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "b", "u", "v", "w", "<eos>"]
    # A short completion stays whole and the prompt alone is cut.
    ids, _ = encode_candidate(tokenizer, "abcdef", "u", max_length=6, truncate=True)
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "d", "e", "f", "u", "<eos>"]


@pytest.mark.parametrize("prompt_length", [1, 3, 9])
@pytest.mark.parametrize("completion_length", [1, 3, 9])
@pytest.mark.parametrize("max_length", [2, 3, 5, 8, 30])
def test_truncation_uses_all_the_room_and_no_more(tokenizer, prompt_length, completion_length, max_length):
    prompt, completion = "a" * prompt_length, "b" * completion_length
    ids, overlong = encode_candidate(tokenizer, prompt, completion, max_length=max_length, truncate=True)
    whole = prompt_length + completion_length + 1
    assert len(ids) == min(whole, max_length)
    assert overlong == (whole > max_length)
    assert ids[-1] == tokenizer.eos_token_id


def test_overlong_is_refused_dropped_or_truncated_and_counted(tokenizer):
    rankings = [
        ranking("a", ["bcdefgh", "c", "d"], [0, 1, 2]),
        ranking("a", ["bcdefgh", "c"], [0, 1]),
        ranking("a", ["b", "c"], [0, 1]),
    ]
    with pytest.raises(DataError, match=r"candidate 0 is longer than max_length=5 .*overlong"):
        encode_rankings(rankings, tokenizer, max_length=5)
    kept, report = encode_rankings(rankings, tokenizer, max_length=5, overlong="drop")
    assert [one.ranks for one in kept] == [[1, 2], [0, 1]]
    assert (report.rankings, report.candidates, report.dropped_candidates, report.dropped_rankings) == (3, 7, 2, 1)
    kept, report = encode_rankings(rankings, tokenizer, max_length=5, overlong="truncate")
    assert [len(one.ranks) for one in kept] == [3, 2, 2]
    assert report.truncated_candidates == 2
    assert "2 truncated candidates" in str(report)


def test_uninformative_rankings_are_counted(tokenizer):
    rankings = [ranking("a", ["b", "c"], [0, 0]), ranking("a", ["b", "c"], [1, 0])]
    kept, report = encode_rankings(rankings, tokenizer, max_length=None)
    assert len(kept) == report.uninformative_rankings == 1
    with pytest.raises(DataError, match="no ranking is left"):
        encode_rankings(rankings[:1], tokenizer, max_length=None)


def test_batch_holds_every_candidate_once(tokenizer):
    rankings = [
        ranking("a", ["bcd", "c", "d"], [0, 2, 1], (3.0, 1.0, 2.0)),
        ranking("ab", ["b", "c"], [1, 0], (0.5, 0.75)),
    ]
    encoded, _ = encode_rankings(rankings, tokenizer, max_length=None)
    batch = RankingCollator(tokenizer.pad_token_id)(encoded)
    assert batch["input_ids"].shape == (5, 5)  # five candidates, not 2 x (3 + 1) sides of pairs; a b c d eos
    assert batch["ranks"].tolist() == [[0, 2, 1], [1, 0, 0]]
    assert batch["mask"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["gold_scores"].tolist() == [[3.0, 1.0, 2.0], [0.5, 0.75, 0.0]]
    table = scatter_scores(torch.arange(1.0, 6.0), batch)
    assert table.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]


def test_scores_are_left_out_unless_every_ranking_has_them(tokenizer):
    rankings = [ranking("a", ["b", "c"], [0, 1], (2.0, 1.0)), ranking("a", ["b", "c"], [1, 0])]
    encoded, _ = encode_rankings(rankings, tokenizer, max_length=None)
    assert "gold_scores" not in RankingCollator(0)(encoded)


def test_batch_says_what_candidates_of_a_prompt_share(tokenizer):
    # "ab>" and the "c" that all three begin with; of the second, "de>" alone. Ends differ, as no text is empty.
    rankings = [ranking("ab>", ["cd", "ce", "c"], [0, 1, 2]), ranking("de>", ["a", "b"], [0, 1])]
    encoded, _ = encode_rankings(rankings, tokenizer, max_length=None)
    assert RankingCollator(0)(encoded)["shared_lengths"].tolist() == [4, 4, 4, 3, 3]
