"""Products with cached keys and values against sums written out."""

import pytest
import torch

from rlhf.lm.decode_products import match_keys, weigh_values


def views(rows, heads, columns, capacity):
    """As a cache gives them: the first rows and columns of wider storage."""
    generator = torch.Generator().manual_seed(0)
    storage = torch.randn(rows + 2, heads, capacity, 8, generator=generator)
    weights = torch.rand(rows * heads, 1, columns, generator=generator)
    return weights, storage[:rows, :, :columns]


@torch.no_grad()
@pytest.mark.parametrize(("columns", "capacity"), [(1, 9), (5, 9), (9, 9)])
def test_equals_the_sum_written_out(columns, capacity):
    weights, values = views(3, 2, columns, capacity)
    expected = (weights.view(3, 2, columns, 1).double() * values.double()).sum(dim=2)
    got = weigh_values(weights, values)
    torch.testing.assert_close(got.view(3, 2, 8).double(), expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_last_row_of_exact_storage_reads_nothing_beyond_it():
    storage = torch.ones(2, 2, 6, 8)
    assert torch.equal(weigh_values(torch.ones(4, 1, 4), storage[:, :, :4]), torch.full((4, 1, 8), 4.0))


@torch.no_grad()
def test_other_layouts_precisions_and_several_queries_take_the_product():
    weights, values = views(3, 2, 5, 9)
    expected = torch.bmm(weights, values.flatten(0, 1))
    turned = values.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(weigh_values(weights, turned), expected)
    torch.testing.assert_close(weigh_values(weights.double(), values.double()), expected.double())
    several = weigh_values(weights.expand(-1, 3, -1), values)
    torch.testing.assert_close(several, expected.expand(-1, 3, -1))


@torch.no_grad()
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize(("columns", "queries_per_head"), [(1, 1), (5, 1), (9, 1), (5, 3)])
def test_scores_equal_the_sum_written_out(across, columns, queries_per_head):
    generator = torch.Generator().manual_seed(0)
    storage = torch.full((5, 2, 8, 9), torch.nan) if across else torch.full((5, 2, 9, 8), torch.nan)
    storage = storage.transpose(2, 3) if across else storage
    keys = storage[:3, :, :columns]
    keys.copy_(torch.randn(3, 2, columns, 8, generator=generator))  # what is yet to be written stays NaN
    queries = torch.randn(6, queries_per_head, 8, generator=generator)
    expected = torch.einsum("nhrd,nhtd->nhrt", queries.view(3, 2, -1, 8).double(), keys.double())
    got = match_keys(queries, keys)
    torch.testing.assert_close(got.double(), expected.flatten(0, 1), atol=1e-6, rtol=1e-6)
