"""Scores are those of the docstring, as near as they say, and only what is asked for is written."""

from __future__ import annotations

import pytest
import torch

from freekv_kernels import Half, summarize_pages
from tests.support import fp8
from tests.support.op_tables import batch_of, decode_keys, flags_of, store_of

FREE = -7.0  # what nobody may overwrite


def expected_scores(queries, summary, batch, num_kv_heads, codes=None, scale=None):
    """By the definition, for every row and each of its pages; FREE past them."""
    batch_size, max_pages = batch.page_table.shape
    expected = torch.full((batch_size, num_kv_heads, queries.shape[2], max_pages), FREE)
    keys = None if codes is None else decode_keys(summary, codes)[0]
    queries, summary = queries.double().cpu(), fp8.numbers(summary)
    for b in range(batch_size):
        for h in range(num_kv_heads):
            for p in range(int(batch.num_pages[b])):
                page, q = batch.page_table[b, p], queries[batch.rows[b], h]
                if codes is None:
                    low, high = summary[page, h]
                    expected[b, h, :, p] = torch.maximum(q * low, q * high).sum(-1)
                else:
                    logits = q @ keys[page, h].T
                    expected[b, h, :, p] = logits.amax(-1) if scale is None else (scale * logits).logsumexp(-1)
    return expected.flatten(0, 1)


def inputs(impl, heads=2, group=3, dim=16, pages=9, store=11, batch=3, dtype=torch.float32):
    """Queries as a view, one layer of more."""
    queries = torch.randn(batch + 1, 2, heads, group, dim).to(impl.device, dtype)[:, 1]
    summary = fp8.bounds(torch.randn(store, heads, 2, dim).sort(2).values).to(impl.device)
    return queries, summary, torch.randint(0, store, (batch, pages)).to(impl.device)


def codes_for(summary, bits, page_size=16):
    """Any; None without bits."""
    if bits == 0:
        return None
    shape = (*summary.shape[:2], page_size, summary.shape[3] * bits // 8)
    return torch.randint(256, shape, dtype=torch.uint8).to(summary.device)


def free(num_rows, group, max_pages, device):
    return torch.full((num_rows, group, max_pages), FREE, device=device)


@pytest.mark.parametrize(
    "group, dim", [(1, 16), (3, 16), (8, 16), (16, 16), (4, 64), (3, 96), (4, 128), (2, 256)], ids=str
)
def test_a_score_is_the_sum_of_the_larger_products(impl, group, dim):
    queries, summary, table = inputs(impl, heads=3, group=group, dim=dim, batch=2)
    batch = batch_of(table, [9, 5], [4, 4], rows=[2, 1], num_kv_heads=3)
    out = free(6, group, 9, impl.device)
    assert impl.ops.score_pages(queries, summary, batch, Half.BACK, None, out) is out
    torch.testing.assert_close(out.cpu(), expected_scores(queries, summary, batch, 3))


@pytest.mark.parametrize(
    "group, dim, bits, page_size",
    [(1, 16, 2, 16), (4, 64, 1, 32), (3, 96, 2, 32), (4, 128, 2, 32), (8, 128, 4, 16), (16, 40, 4, 64)],
    ids=str,
)
def test_a_score_with_codes_is_the_largest_product_with_a_decoded_key(impl, group, dim, bits, page_size):
    queries, summary, table = inputs(impl, heads=3, group=group, dim=dim, batch=2)
    batch, codes = batch_of(table, [9, 5], [4, 4], rows=[2, 1], num_kv_heads=3), codes_for(summary, bits, page_size)
    out = free(6, group, 9, impl.device)
    assert impl.ops.score_pages(queries, summary, batch, Half.BACK, None, out, codes) is out
    torch.testing.assert_close(out.cpu(), expected_scores(queries, summary, batch, 3, codes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "group, dim, bits, page_size", [(1, 16, 2, 16), (3, 96, 2, 32), (8, 128, 4, 16), (16, 40, 4, 64)], ids=str
)
@pytest.mark.parametrize("scale", [0.09, 1.0])
def test_a_score_with_codes_and_a_scale_is_the_logarithm_of_the_pages_mass(impl, group, dim, bits, page_size, scale):
    queries, summary, table = inputs(impl, heads=3, group=group, dim=dim, batch=2)
    batch, codes = batch_of(table, [9, 5], [4, 4], rows=[2, 1], num_kv_heads=3), codes_for(summary, bits, page_size)
    out = free(6, group, 9, impl.device)
    impl.ops.score_pages(queries, summary, batch, Half.BACK, None, out, codes, scale)
    expected = expected_scores(queries, summary, batch, 3, codes, scale)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_the_mass_of_far_logits_neither_overflows_nor_vanishes(impl):
    queries, summary, table = inputs(impl, heads=1, group=1, batch=1)
    batch, codes = batch_of(table, [9], [4], num_kv_heads=1), codes_for(summary, 2)
    for factor in (1e3, 1e-3):
        scores = impl.ops.score_pages(queries * factor, summary, batch, Half.FRONT, None, None, codes, 1.0).cpu()
        expected = expected_scores(queries * factor, summary, batch, 1, codes, 1.0)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("page_size", [16, 32])
def test_with_codes_a_score_is_as_near_to_the_largest_logit_as_its_steps_are_short(impl, page_size):
    keys = torch.randn(4, 2, page_size, 32) + 5 * torch.randn(32)
    host = impl.host(torch.stack((keys, keys), 2))
    summary = fp8.bounds(torch.stack((keys.amin(2), keys.amax(2)), 2)).to(impl.device)
    q = torch.randn(2, 2, 4, 32)
    batch = batch_of(torch.arange(4, device=impl.device)[None], [4], [2])
    largest = torch.einsum("hgd,phtd->hgpt", q[1], keys).amax(-1)
    errors = []
    for bits in (1, 2, 4):
        codes = codes_for(summary, bits, page_size)
        last_slots = torch.arange(4, device=impl.device) * page_size + page_size - 1
        impl.ops.encode_pages(last_slots, store_of(host, summary), codes)
        scores = impl.ops.score_pages(q.to(impl.device), summary, batch, Half.FRONT, codes=codes).cpu()
        step = fp8.numbers(summary).diff(dim=2).squeeze(2).float() / 2**bits
        bound = torch.einsum("hgd,phd->hgp", q[1].abs(), step / 2)
        error = (scores.view_as(largest) - largest).abs()
        assert (error <= bound + 1e-4).all()
        errors.append(error.mean())
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_no_token_of_a_page_exceeds_the_pages_score(impl):
    keys = torch.randn(64, 2, 16)
    summary = torch.empty(8, 2, 2, 16, dtype=torch.uint8)
    summarize_pages(summary, keys, torch.arange(64), 8)
    q = torch.randn(2, 2, 4, 16)
    batch = batch_of(torch.arange(8, device=impl.device)[None], [8], [4])
    scores = impl.ops.score_pages(q.to(impl.device), summary.to(impl.device), batch, Half.FRONT).cpu()
    logits = torch.einsum("hgd,thd->hgt", q[1], keys).view(2, 4, 8, 8).amax(-1)
    assert (scores >= logits - 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [0, 2])
def test_scores_of_16_bit_tensors_are_computed_in_fp32(impl, bits, dtype):
    queries, summary, table = inputs(impl, dim=64, dtype=dtype)
    batch, codes = batch_of(table, [9, 9, 9], [4, 4, 4]), codes_for(summary, bits)
    scores = impl.ops.score_pages(queries, summary, batch, Half.FRONT, codes=codes)
    assert scores.dtype == torch.float32 and scores.shape == (6, 3, 9)
    # With codes, query times step has 11 bits; without, tensor cores cut off what they add to a sum.
    near = {"rtol": 2e-3, "atol": 2e-2} if bits else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(scores.cpu(), expected_scores(queries, summary, batch, 2, codes), **near)


@pytest.mark.parametrize("bits", [0, 2])
def test_requests_within_their_budget_and_padding_keep_their_values(impl, bits):
    queries, summary, table = inputs(impl, batch=4)
    codes = codes_for(summary, bits)
    batch = batch_of(table, [9, 8, 1, 0], [8, 8, 8, 0], rows=[3, 1, 2, 0])
    out = free(8, 3, 9, impl.device)
    impl.ops.score_pages(queries, summary, batch, Half.FRONT, None, out, codes)
    expected = expected_scores(queries, summary, batch, 2, codes)
    expected[2:] = FREE
    torch.testing.assert_close(out.cpu(), expected)


def test_the_step_that_reads_decides_whether_a_request_is_over_its_budget(impl):
    queries, summary, table = inputs(impl, batch=1)
    batch = batch_of(table, [8], [8], num_pages_next=[9])
    expected = expected_scores(queries, summary, batch, 2)
    for half in Half:
        out = free(2, 3, 9, impl.device)
        impl.ops.score_pages(queries, summary, batch, half, None, out)
        wanted = torch.full_like(expected, FREE) if half == Half.FRONT else expected
        torch.testing.assert_close(out.cpu(), wanted)


@pytest.mark.parametrize("bits", [0, 2])
@pytest.mark.parametrize("listed", [[], [4], [5, 0, 3], [3, 1, 5, 4, 2, 0]], ids=str)
def test_of_a_list_only_its_rows_are_written_whatever_their_order(impl, bits, listed):
    queries, summary, table = inputs(impl)
    codes = codes_for(summary, bits)
    batch = batch_of(table, [9, 7, 6], [4, 4, 4])
    out = free(6, 3, 9, impl.device)
    impl.ops.score_pages(queries, summary, batch, Half.FRONT, flags_of(listed, 6, impl.device), out, codes)
    expected = expected_scores(queries, summary, batch, 2, codes)
    others = [row for row in range(6) if row not in listed]
    expected[others] = FREE
    torch.testing.assert_close(out.cpu(), expected)


@pytest.mark.parametrize("bits", [0, 2])
def test_a_wider_output_is_written_up_to_the_pages_of_the_table(impl, bits):
    queries, summary, table = inputs(impl)
    codes = codes_for(summary, bits)
    batch = batch_of(table[:, :7], [7, 7, 6], [4, 4, 4])
    out = free(6, 3, 9, impl.device)
    impl.ops.score_pages(queries, summary, batch, Half.FRONT, None, out, codes)
    torch.testing.assert_close(out[:, :, :7].cpu(), expected_scores(queries, summary, batch, 2, codes))
    assert (out[:, :, 7:] == FREE).all()


def lists_of(rows, width):
    """Lists of pages, with -1 behind."""
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)


def of_columns(expected, pages):
    """Scores of the pages of a list, FREE where none is, from those of all pages."""
    scores = expected.gather(2, pages.cpu().long().clamp(min=0)[:, None].expand(-1, expected.shape[1], -1))
    return scores.where((pages.cpu() >= 0)[:, None], FREE)


@pytest.mark.parametrize("bits, scale", [(0, None), (2, None), (2, 0.3), (4, 0.3)])
def test_of_a_list_of_pages_each_column_has_the_score_of_its_page(impl, bits, scale):
    """Rows list pages of their own; two requests share some."""
    queries, summary, table = inputs(impl, group=5, dim=64)
    table[1, :4] = table[0, :4]
    codes = codes_for(summary, bits)
    batch = batch_of(table, [9, 7, 6], [4, 4, 6], num_pages_next=[9, 7, 6])
    rows = [[0, 3, 4, 8], [1, 2, 3], [], [0, 1, 2, 3, 4, 5, 6], [0, 5], [5]]
    pages = lists_of(rows, 8).to(impl.device)
    out = free(6, 5, 11, impl.device)
    found = impl.ops.score_pages(queries, summary, batch, Half.BACK, None, out, codes, scale, pages)
    assert found is out and (out[:, :, 8:] == FREE).all()
    expected = of_columns(expected_scores(queries, summary, batch, 2, codes, scale), pages)
    expected[4:] = FREE  # within the budget
    torch.testing.assert_close(out[:, :, :8].cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_programs", [1, 7, 1000])
def test_programs_share_the_columns_of_long_lists(impl, monkeypatch, num_programs):
    monkeypatch.setattr("freekv_kernels.score_pages_triton.NUM_PROGRAMS", num_programs)
    queries, summary, table = inputs(impl, heads=1, group=2, pages=300, batch=2)
    codes, batch = codes_for(summary, 2), batch_of(table, [300, 9], [4, 4], num_kv_heads=1)
    long = torch.randperm(300)[:130].sort().values.tolist()
    pages = lists_of([long, list(range(9))], 140).to(impl.device)
    flags = flags_of([0], 2, impl.device)
    expected = of_columns(expected_scores(queries, summary, batch, 1, codes, 0.2), pages)
    for listed in (None, flags):
        out = free(2, 2, 140, impl.device)
        impl.ops.score_pages(queries, summary, batch, Half.FRONT, listed, out, codes, 0.2, pages)
        if listed is not None:
            expected[1] = FREE
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [0, 2])
@pytest.mark.parametrize("num_programs", [1, 7, 1000])
@pytest.mark.parametrize("listed", [None, [2, 1]], ids=str)
def test_programs_share_all_pages_of_long_requests(impl, bits, monkeypatch, num_programs, listed):
    monkeypatch.setattr("freekv_kernels.score_pages_triton.NUM_PROGRAMS", num_programs)
    queries, summary, table = inputs(impl, heads=1, group=1, dim=16 if bits else 128, pages=300, batch=3)
    codes = codes_for(summary, bits)
    batch = batch_of(table, [300, 129, 64], [4, 4, 4], num_kv_heads=1)
    out = free(3, 1, 300, impl.device)
    flags = None if listed is None else flags_of(listed, 3, impl.device)
    impl.ops.score_pages(queries, summary, batch, Half.FRONT, flags, out, codes)
    expected = expected_scores(queries, summary, batch, 1, codes)
    if listed is not None:
        expected[0] = FREE
    torch.testing.assert_close(out.cpu(), expected)


def test_summaries_may_lie_more_than_2_to_the_31_elements_apart(impl):
    """Memory that nobody touches costs nothing on a CPU."""
    heads, dim = 8, 256
    num_pages = 2**31 // (heads * 2 * dim) + 2
    summary = torch.empty(num_pages, heads, 2, dim, dtype=torch.uint8, device=impl.device)
    pages = [0, num_pages - 1, num_pages - 2]
    summary[pages] = fp8.bounds(torch.randn(3, heads, 2, dim).sort(2).values).to(summary)
    queries = torch.randn(2, heads, 1, dim, dtype=torch.float16).to(impl.device)
    batch = batch_of(torch.tensor([pages], device=impl.device), [3], [2], num_kv_heads=heads)
    scores = impl.ops.score_pages(queries, summary, batch, Half.FRONT).cpu()
    known = batch._replace(page_table=torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(scores, expected_scores(queries, summary[pages], known, heads))
