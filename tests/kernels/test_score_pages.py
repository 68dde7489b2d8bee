"""Scores are the bound of the docstring, a bound they are, and only what is asked for is written."""

from __future__ import annotations

import pytest
import torch

from freekv_kernels import Read, summarize_pages
from op_tables import batch_of, flags_of

FREE = -7.0  # what nobody may overwrite


def expected_scores(queries, summary, batch, num_kv_heads):
    """By the definition, for every row and each of its pages; FREE past them."""
    batch_size, max_pages = batch.page_table.shape
    expected = torch.full((batch_size, num_kv_heads, queries.shape[2], max_pages), FREE)
    queries, summary = queries.float().cpu(), summary.float().cpu()
    for b in range(batch_size):
        for h in range(num_kv_heads):
            for p in range(int(batch.num_pages[b])):
                low, high = summary[batch.page_table[b, p], h]
                q = queries[batch.rows[b], h]
                expected[b, h, :, p] = torch.maximum(q * low, q * high).sum(-1)
    return expected.flatten(0, 1)


def inputs(impl, heads=2, group=3, dim=16, pages=9, store=11, batch=3, dtype=torch.float32):
    """Queries as a view, one layer of more."""
    queries = torch.randn(batch + 1, 2, heads, group, dim).to(impl.device, dtype)[:, 1]
    summary = torch.randn(store, heads, 2, dim).sort(2).values.to(impl.device, dtype)
    return queries, summary, torch.randint(0, store, (batch, pages)).to(impl.device)


def free(num_rows, group, max_pages, device):
    return torch.full((num_rows, group, max_pages), FREE, device=device)


@pytest.mark.parametrize(
    "group, dim", [(1, 16), (3, 16), (8, 16), (16, 16), (4, 64), (3, 96), (4, 128), (2, 256)], ids=str
)
def test_a_score_is_the_sum_of_the_larger_products(impl, group, dim):
    queries, summary, table = inputs(impl, heads=3, group=group, dim=dim, batch=2)
    batch = batch_of(table, [9, 5], [4, 4], rows=[2, 1])
    out = free(6, group, 9, impl.device)
    assert impl.ops.score_pages(queries, summary, batch, Read.BACK, None, out) is out
    torch.testing.assert_close(out.cpu(), expected_scores(queries, summary, batch, 3))


def test_no_token_of_a_page_exceeds_the_pages_score(impl):
    keys = torch.randn(64, 2, 16)
    summary = torch.empty(8, 2, 2, 16)
    summarize_pages(summary, keys, torch.arange(64), 8)
    q = torch.randn(2, 2, 4, 16)
    batch = batch_of(torch.arange(8, device=impl.device)[None], [8], [4])
    scores = impl.ops.score_pages(q.to(impl.device), summary.to(impl.device), batch, Read.FRONT).cpu()
    logits = torch.einsum("hgd,thd->hgt", q[1], keys).view(2, 4, 8, 8).amax(-1)
    assert (scores >= logits - 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_16_bit_tensors_are_computed_in_fp32(impl, dtype):
    queries, summary, table = inputs(impl, dim=64, dtype=dtype)
    batch = batch_of(table, [9, 9, 9], [4, 4, 4])
    scores = impl.ops.score_pages(queries, summary, batch, Read.FRONT)
    assert scores.dtype == torch.float32 and scores.shape == (6, 3, 9)
    torch.testing.assert_close(scores.cpu(), expected_scores(queries, summary, batch, 2))


def test_requests_within_their_budget_and_padding_keep_their_values(impl):
    queries, summary, table = inputs(impl, batch=4)
    batch = batch_of(table, [9, 8, 1, 0], [8, 8, 8, 0], rows=[3, 1, 2, 0])
    out = free(8, 3, 9, impl.device)
    impl.ops.score_pages(queries, summary, batch, Read.FRONT, None, out)
    expected = expected_scores(queries, summary, batch, 2)
    expected[2:] = FREE
    torch.testing.assert_close(out.cpu(), expected)


def test_the_step_that_reads_decides_whether_a_request_is_over_its_budget(impl):
    queries, summary, table = inputs(impl, batch=1)
    batch = batch_of(table, [8], [8], num_pages_next=[9])
    expected = expected_scores(queries, summary, batch, 2)
    for read in Read:
        out = free(2, 3, 9, impl.device)
        impl.ops.score_pages(queries, summary, batch, read, None, out)
        wanted = torch.full_like(expected, FREE) if read == Read.FRONT else expected
        torch.testing.assert_close(out.cpu(), wanted)


@pytest.mark.parametrize("listed", [[], [4], [5, 0, 3], [3, 1, 5, 4, 2, 0]], ids=str)
def test_of_a_list_only_its_rows_are_written_whatever_their_order(impl, listed):
    queries, summary, table = inputs(impl)
    batch = batch_of(table, [9, 7, 6], [4, 4, 4])
    out = free(6, 3, 9, impl.device)
    impl.ops.score_pages(queries, summary, batch, Read.FRONT, flags_of(listed, 6, impl.device), out)
    expected = expected_scores(queries, summary, batch, 2)
    others = [row for row in range(6) if row not in listed]
    expected[others] = FREE
    torch.testing.assert_close(out.cpu(), expected)


def test_a_wider_output_is_written_up_to_the_pages_of_the_table(impl):
    queries, summary, table = inputs(impl)
    batch = batch_of(table[:, :7], [7, 7, 6], [4, 4, 4])
    out = free(6, 3, 9, impl.device)
    impl.ops.score_pages(queries, summary, batch, Read.FRONT, None, out)
    torch.testing.assert_close(out[:, :, :7].cpu(), expected_scores(queries, summary, batch, 2))
    assert (out[:, :, 7:] == FREE).all()


@pytest.mark.parametrize("num_programs", [1, 7, 1000])
@pytest.mark.parametrize("listed", [None, [2, 1]], ids=str)
def test_programs_share_all_pages_of_long_requests(impl, monkeypatch, num_programs, listed):
    monkeypatch.setattr("freekv_kernels.score_pages_triton.NUM_PROGRAMS", num_programs)
    queries, summary, table = inputs(impl, heads=1, group=1, dim=128, pages=300, batch=3)
    batch = batch_of(table, [300, 129, 64], [4, 4, 4])
    out = free(3, 1, 300, impl.device)
    flags = None if listed is None else flags_of(listed, 3, impl.device)
    impl.ops.score_pages(queries, summary, batch, Read.FRONT, flags, out)
    expected = expected_scores(queries, summary, batch, 1)
    if listed is not None:
        expected[0] = FREE
    torch.testing.assert_close(out.cpu(), expected)


def test_summaries_may_lie_more_than_2_to_the_31_elements_apart(impl):
    """Memory that nobody touches costs nothing on a CPU."""
    heads, dim = 8, 256
    num_pages = 2**31 // (heads * 2 * dim) + 2
    summary = torch.empty(num_pages, heads, 2, dim, dtype=torch.float16, device=impl.device)
    pages = [0, num_pages - 1, num_pages - 2]
    summary[pages] = torch.randn(3, heads, 2, dim).sort(2).values.to(summary)
    queries = torch.randn(2, heads, 1, dim).to(summary)
    batch = batch_of(torch.tensor([pages], device=impl.device), [3], [2])
    scores = impl.ops.score_pages(queries, summary, batch, Read.FRONT).cpu()
    known = batch._replace(page_table=torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(scores, expected_scores(queries, summary[pages], known, heads))
