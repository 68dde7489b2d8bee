"""The share of a page is its part of the whole attention, pooled over the group: compared with a softmax of tokens."""

from __future__ import annotations

import pytest
import torch

from freekv_kernels import PLAIN, Half, PageStore
from tests.support.op_tables import batch_of, flags_of

PAGE, DIM, HEADS, HOST_PAGES, SCALE, FREE = 16, 32, 2, 60, 0.3, 7.0


def make(impl, num_pages, offsets, group, is_resident=True, dtype=torch.float32):
    """Requests with random keys; the latest token of each is at an offset of its last page."""
    requests = len(num_pages)
    host = impl.host(torch.randn(HOST_PAGES, HEADS, 2, PAGE, DIM).to(dtype))
    page_table = torch.randperm(HOST_PAGES)[: requests * max(num_pages)].view(requests, -1)
    table = torch.full((HOST_PAGES, HEADS), -1, dtype=torch.int32)
    if is_resident:
        table = torch.arange(HOST_PAGES * HEADS, dtype=torch.int32).view(HOST_PAGES, HEADS)
    blocks = host.flatten(0, 1).to(impl.device, copy=True)
    if is_resident and impl.name == "triton":
        host[page_table] = float("nan")  # a kernel reads what is on the device
    store = PageStore(host, None, blocks, table.to(impl.device), PLAIN)
    batch = batch_of(page_table.to(impl.device), num_pages, [2] * requests, num_kv_heads=HEADS)
    slots = [
        int(page_table[b, n - 1]) * PAGE + offset for b, (n, offset) in enumerate(zip(num_pages, offsets, strict=True))
    ]
    batch = batch._replace(slots=torch.tensor(slots, device=impl.device))
    queries = torch.randn(requests + 2, HEADS, group, DIM).to(dtype)
    keys = blocks.cpu().view(HOST_PAGES, HEADS, 2, PAGE, DIM)[:, :, 0]
    return store, batch, queries, keys


def masses_of(queries, keys, page_table, row, num_pages, num_tokens, head):
    """Logarithms of the masses of a request's pages: float64 ``[group, num_pages]``."""
    own = keys[page_table[:num_pages], head].double().flatten(0, 1)[: (num_pages - 1) * PAGE + num_tokens]
    logits = SCALE * queries[row, head].double() @ own.T
    return torch.stack([page.logsumexp(-1) for page in logits.split(PAGE, -1)], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("is_resident", [True, False], ids=["resident", "absent"])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_shares_are_those_of_softmax_over_all_tokens(impl, group, is_resident, dtype):
    num_pages, offsets = [7, 1, 20], [0, 3, PAGE - 1]  # the second is within its budget
    store, batch, queries, keys = make(impl, num_pages, offsets, group, is_resident, dtype)
    scores = torch.full((3 * HEADS, group, 23), FREE)
    expected = {}
    for b, (n, offset) in enumerate(zip(num_pages, offsets, strict=True)):
        for h in range(HEADS):
            masses = masses_of(queries, keys, batch.page_table[b].cpu(), b + 1, n, offset + 1, h)
            scores[b * HEADS + h, :, : n - 1] = masses[:, :-1].float()  # of the last page nobody knows a score
            scores[b * HEADS + h, :, n - 1] = float("nan")
            expected[b * HEADS + h] = masses.softmax(-1).mean(0).log()
    before, scores = scores.clone(), scores.to(impl.device)
    impl.ops.share_pages(scores, queries.to(impl.device), store, batch, Half.FRONT, SCALE)
    for row, shares in expected.items():
        if num_pages[row // HEADS] > 2:
            assert torch.allclose(scores[row, 0, : len(shares)].cpu().double(), shares, atol=1e-5), row
            assert abs(scores[row, 0, : len(shares)].exp().sum() - 1) < 1e-5
        else:
            assert torch.equal(scores[row].cpu().nan_to_num(), before[row].nan_to_num())


@pytest.mark.parametrize("listed_rows", [None, [3, 0]], ids=["every-row", "flagged"])
def test_listed_pages_share_the_attention_among_themselves(impl, listed_rows):
    group, n, width = 3, 12, 9
    store, batch, queries, keys = make(impl, [n, n], [4, 9], group)
    pages = torch.full((2 * HEADS, width), -1, dtype=torch.int32)
    scores = torch.full((2 * HEADS, group, width), FREE)
    for row in range(2 * HEADS):
        own = [*sorted(torch.randperm(n - 1)[: 4 + row % 2].tolist()), n - 1]
        pages[row, : len(own)] = torch.tensor(own)
        b, h = divmod(row, HEADS)
        masses = masses_of(queries, keys, batch.page_table[b].cpu(), b + 1, n, [5, 10][b], h)
        scores[row, :, : len(own)] = masses[:, own].float()
    masses, own = scores.clone(), scores.to(impl.device)
    flags = None if listed_rows is None else flags_of(listed_rows, 2 * HEADS, impl.device)
    args = (queries.to(impl.device), store, batch, Half.BACK, SCALE, flags, pages.to(impl.device))
    impl.ops.share_pages(own, *args)
    for row in range(2 * HEADS):
        num_listed = int((pages[row] >= 0).sum())
        if listed_rows is None or row in listed_rows:
            shares = masses[row, :, :num_listed].softmax(-1).mean(0).log()
            assert torch.allclose(own[row, 0, :num_listed].cpu(), shares, atol=1e-5)
        else:
            assert torch.equal(own[row].cpu(), masses[row])


def test_shares_of_distant_pages_do_not_vanish(impl):
    store, batch, queries, _ = make(impl, [6], [3], 2)
    scores = torch.tensor([-200.0, -100.0, 300.0, 100.0, 0.0, 0.0]).expand(HEADS, 2, 6).to(impl.device, copy=True)
    impl.ops.share_pages(scores, queries.to(impl.device), store, batch, Half.FRONT, SCALE)
    assert torch.allclose(scores[:, 0, :4].cpu(), torch.tensor([-500.0, -400.0, 0.0, -200.0]), atol=1e-3)


def test_padding_has_no_share(impl):
    store, batch, queries, _ = make(impl, [6, 5], [3, 3], 2)
    batch = batch._replace(num_pages=batch.num_pages * 0, num_pages_next=batch.num_pages * 0, rows=batch.rows * 0)
    scores = torch.full((2 * HEADS, 2, 8), FREE, device=impl.device)
    impl.ops.share_pages(scores, queries.to(impl.device), store, batch, Half.BACK, SCALE)
    assert (scores == FREE).all()
