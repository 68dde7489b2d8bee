"""Scores are the bound of the docstring, and a bound they are."""

import pytest
import torch

from freekv_kernels import score_pages, summarize_pages


@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_a_score_is_the_sum_of_the_larger_products(group_size):
    batch, heads, pages, dim = 2, 3, 5, 16
    bounds = torch.randn(11, heads, 2, dim).sort(2).values
    q = torch.randn(batch, heads, group_size, dim)
    table = torch.randint(0, 11, (batch, pages))
    expected = torch.empty(batch, heads, group_size, pages)
    for b in range(batch):
        for h in range(heads):
            for p in range(pages):
                low, high = bounds[table[b, p], h]
                expected[b, h, :, p] = torch.maximum(q[b, h] * low, q[b, h] * high).sum(-1)
    torch.testing.assert_close(score_pages(q, bounds, table), expected)


def test_no_token_of_a_page_exceeds_the_pages_score():
    keys = torch.randn(64, 2, 16)
    summary = torch.empty(8, 2, 2, 16)
    summarize_pages(summary, keys, torch.arange(64), 8)
    q = torch.randn(1, 2, 4, 16)
    scores = score_pages(q, summary, torch.arange(8)[None])[0]
    logits = torch.einsum("hgd,thd->hgt", q[0], keys).view(2, 4, 8, 8).amax(-1)
    assert (scores >= logits - 1e-5).all()


def test_scores_of_bf16_tensors_are_computed_in_fp32():
    summary = torch.randn(6, 1, 2, 64).sort(2).values.bfloat16()
    q = torch.randn(1, 1, 2, 64).bfloat16()
    table = torch.arange(6)[None]
    torch.testing.assert_close(score_pages(q, summary, table), score_pages(q.float(), summary.float(), table))
