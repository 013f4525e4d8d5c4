import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from rlhf.lm import cache as cache_module
from rlhf.lm.cache import InPlaceCache, padding_bias
from rlhf.lm.shared_prompt import PromptGroups, attend

HEADS, WIDTH = 2, 3


def states(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, HEADS, columns, WIDTH, generator=generator) for _ in range(2)]


def repeated(tensor, times):
    return tensor.repeat_interleave(times, dim=0)


@pytest.fixture
def narrow_storage(monkeypatch):
    monkeypatch.setattr(cache_module, "INITIAL_COLUMNS", 2)
    monkeypatch.setattr(cache_module, "ACROSS_COLUMNS", 4)


@pytest.mark.parametrize("keys_across", [False, True])
@pytest.mark.parametrize("in_one_write", [False, True])
@pytest.mark.usefixtures("narrow_storage")  # so that storage has to grow
def test_contents_are_those_of_a_dynamic_cache_through_growth_and_row_removal(in_one_write, keys_across):
    ours, theirs = InPlaceCache(2, capacity=4 + 9), DynamicCache()
    for layer in range(2):
        prompt = states(3, 4, seed=layer)
        ours.update(*prompt, layer)
        theirs.update(*prompt, layer)
    everything = torch.ones(3, 4, dtype=torch.bool)
    ours.start_decoding(2, share=False, prompt_mask=everything, keys_across=keys_across)
    theirs.batch_repeat_interleave(2)
    rows = torch.arange(6)
    for step in range(9):
        for layer in range(2):
            new = states(len(rows), 1, seed=100 + 10 * step + layer)
            pair = torch.stack([state.squeeze(2) for state in new], dim=1)
            written = ours.append(pair, layer) if in_one_write else ours.update(*new, layer)
            for got, expected in zip(written, theirs.update(*new, layer), strict=True):
                assert torch.equal(got, expected)
        assert ours.get_seq_length() == theirs.get_seq_length() == 5 + step
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)
        if step in (2, 5):  # row 1 finishes; the last row moves into its place
            kept = torch.tensor([0, len(rows) - 1, *range(2, len(rows) - 1)])
            ours.move_rows(torch.tensor([len(rows) - 1]), torch.tensor([1]), kept)
            theirs.batch_select_indices(kept)
            rows = rows[kept]


@pytest.mark.parametrize(("longest", "widths"), [(48, {48}), (144, {80, 144}), (200, {80, 144, 208})])
def test_lines_of_keys_lie_an_odd_number_of_cache_lines_apart(longest, widths):
    """16 float32 fill a cache line; no line holds more columns than the longest answer needs, up to that oddness."""
    cache = InPlaceCache(1, capacity=longest)
    cache.update(*states(1, 16, seed=0), 0)
    cache.start_decoding(1, share=False, prompt_mask=torch.ones(1, 16, dtype=torch.bool), keys_across=True)
    seen = set()
    for _ in range(16, longest):
        cache.append(torch.zeros(1, 2, HEADS, WIDTH), 0)
        seen.add(cache.layers[0].keys.stride(3))
    assert seen == widths
    assert all(width // 16 % 2 == 1 for width in seen)


def test_keys_and_values_may_differ_in_width():
    cache = InPlaceCache(1, capacity=3)
    cache.update(torch.zeros(1, HEADS, 2, WIDTH), torch.ones(1, HEADS, 2, WIDTH + 1), 0)
    cache.start_decoding(1, share=False, prompt_mask=torch.ones(1, 2, dtype=torch.bool))
    keys, values = cache.update(torch.ones(1, HEADS, 1, WIDTH), torch.zeros(1, HEADS, 1, WIDTH + 1), 0)
    assert keys[0, 0, :, 0].tolist() == [0, 0, 1]
    assert values[0, 0, :, WIDTH].tolist() == [1, 1, 0]


def test_writing_does_not_move_storage():
    cache = InPlaceCache(1, capacity=20)
    cache.update(*states(2, 4, 0), 0)
    cache.start_decoding(1, share=False, prompt_mask=torch.ones(2, 4, dtype=torch.bool))
    first = cache.layers[0].keys.data_ptr()
    for step in range(16):
        keys, _ = cache.update(*states(2, 1, step), 0)
        assert keys.data_ptr() == first


def test_shared_prompts_are_stored_once_per_group():
    cache = InPlaceCache(1, capacity=4 + 3)
    prompt = states(2, 4, 0)
    cache.update(*prompt, 0)
    cache.start_decoding(5, share=True, prompt_mask=torch.ones(2, 4, dtype=torch.bool))
    assert cache.layers[0].prompt_keys.shape[0] == 2
    assert cache.layers[0].keys.shape == (10, HEADS, 3, WIDTH)
    keys, _ = cache.update(*states(10, 1, 1), 0)
    assert keys.shape[2] == 1  # attention adds the prompt itself
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("query_heads", [2, 6])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_shared_attention_is_attention_over_prompt_and_completion(query_heads, padded, in_order):
    prompts, prompt_length, own_length = 3, 4, 5
    prompt_of_row = torch.tensor([0, 0, 1, 1, 2, 2] if in_order else [1, 0, 0, 2, 0])
    rows = len(prompt_of_row)
    prompt_keys, prompt_values = states(prompts, prompt_length, 0)
    own_keys, own_values = states(rows, own_length, 1)
    query = torch.randn(rows, query_heads, 1, WIDTH, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(prompts, prompt_length, dtype=torch.bool)
    if padded:
        mask[1, :3] = mask[2, :1] = False
    output = attend(
        query,
        own_keys,
        own_values,
        prompt_keys=prompt_keys,
        prompt_values=prompt_values,
        prompt_bias=padding_bias(mask, torch.float32) if padded else None,
        groups=PromptGroups(prompt_of_row, prompts, in_order=in_order),
        scaling=0.4,
    )
    visible = torch.cat([mask[prompt_of_row], torch.ones(rows, own_length, dtype=torch.bool)], dim=1)
    expected = scaled_dot_product_attention(
        query,
        torch.cat([prompt_keys[prompt_of_row], own_keys], dim=2),
        torch.cat([prompt_values[prompt_of_row], own_values], dim=2),
        attn_mask=visible[:, None, None],
        scale=0.4,
        enable_gqa=True,
    )
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_prompts_without_rows_are_forgotten():
    cache = InPlaceCache(1, capacity=10)
    prompt = states(3, 4, 0)
    cache.update(*prompt, 0)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2, 0] = False
    cache.start_decoding(2, share=True, prompt_mask=mask)
    cache.update(*states(6, 1, 1), 0)
    # Rows 2 and 3, of prompt 1, finish: rows 4 and 5 take their places.
    cache.move_rows(torch.tensor([4, 5]), torch.tensor([2, 3]), torch.tensor([0, 1, 4, 5]))
    assert torch.equal(cache.layers[0].prompt_keys, prompt[0][[0, 2]])
    assert cache.groups.prompt_of_row.tolist() == [0, 0, 1, 1]
    assert (cache.prompt_bias[:, 0, 0] < 0).tolist() == [[False] * 4, [True, False, False, False]]


def test_groups_round_trip_between_rows_and_slots():
    groups = PromptGroups(torch.tensor([2, 0, 0, 2, 2]), 3)
    rows = torch.arange(5 * 2 * 1 * 3, dtype=torch.float32).view(5, 2, 1, 3)
    slots = groups.to_slots(rows)
    assert slots.shape == (3, 2, 3, 3)  # three prompts, at most three rows each
    assert torch.equal(groups.to_rows(slots), rows)
