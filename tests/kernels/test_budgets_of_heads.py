"""A row's budget is its own: what an op does for a row does not depend on the budgets of the request's other heads."""

from __future__ import annotations

import pytest
import torch

from freekv_kernels import BlockTables, Count, Half, MissList, PageStore
from tests.support import fp8
from tests.support.op_tables import batch_of, flags_of

LOW, HIGH, PAGES = 3, 6, 5  # a request of 5 pages is over the first budget and within the second
MIXED = [[LOW, HIGH], [HIGH, LOW]]


def batches(impl, step: int = 4):
    """The mixed batch, and a batch for each budget that all heads have."""
    table = torch.arange(2 * PAGES, device=impl.device).view(2, PAGES)
    return [batch_of(table, [PAGES] * 2, budgets, step=step) for budgets in (MIXED, [LOW] * 2, [HIGH] * 2)]


def by_row(mixed: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each row of ``[4, ...]`` has, and what it should have."""
    return [(mixed[row], low[row] if row in (0, 3) else high[row]) for row in range(4)]


@pytest.mark.parametrize("half", Half)
def test_scores_and_windows(impl, half):
    queries, summary = torch.randn(3, 2, 3, 16), fp8.bounds(torch.randn(2 * PAGES, 2, 2, 16).sort(2).values)
    found = []
    for batch in batches(impl):
        out = torch.full((4, 3, PAGES), -7.0, device=impl.device)
        impl.ops.score_pages(queries.to(impl.device), summary.to(impl.device), batch, half, None, out)
        windows = torch.full((2, 3, 2, HIGH), -9, dtype=torch.int32, device=impl.device)
        scores = out.clone()
        impl.ops.select_pages(scores, batch, half, 1, 1, "softmax", windows)
        found.append((out, windows[:, 1:].flatten(1, 2).transpose(0, 1)))
    for tensors in zip(*found, strict=True):
        assert all(torch.equal(is_, should) for is_, should in by_row(*tensors))
    assert not torch.equal(found[0][0], found[1][0]), "the budgets make a difference"


def test_appended_tokens_flag_the_rows_over_their_budgets(impl):
    found, counted = [], []
    q, k, v = (torch.randn(2, 2, *shape, device=impl.device) for shape in ((3, 16), (16,), (16,)))
    for batch in batches(impl):
        store = PageStore(
            impl.host(torch.zeros(2 * PAGES, 2, 2, 16, 16)),
            torch.zeros(2 * PAGES, 2, 2, 16, dtype=torch.uint8, device=impl.device),
            torch.zeros(1, 2, 16, 16, device=impl.device),
            torch.full((2 * PAGES, 2), -1, dtype=torch.int32, device=impl.device),
        )
        last_q = torch.zeros(3, 2, 3, 16, device=impl.device)
        flags, counters = flags_of([], 4, impl.device), torch.zeros(len(Count), dtype=torch.int64, device=impl.device)
        impl.ops.append_tokens(q, k, v, batch, 2.0, store, last_q, flags, counters)
        found.append(flags.is_flagged)
        counted.append([int(counters[Count.ROWS]), int(counters[Count.FLAGGED_ROWS]), int(flags.count)])
    assert all(torch.equal(is_, should) for is_, should in by_row(*found))
    assert counted == [[2, 2, 2], [4, 4, 4], [0, 0, 0]]


@pytest.mark.parametrize("half", [Half.BACK, Half.BOTH])
def test_the_windows_of_the_next_step_are_looked_up_by_row(impl, half):
    found = []
    for batch in batches(impl):
        windows = torch.arange(HIGH, dtype=torch.int32, device=impl.device).expand(2, 3, 2, HIGH).contiguous()
        blocks = [torch.full((1, 2 * PAGES, 2), -1), *(torch.zeros(1, 4) for _ in range(3)), *(torch.zeros(1),) * 2]
        blocks = BlockTables(*(tensor.int().to(impl.device) for tensor in blocks))
        misses = MissList(
            torch.zeros(40, dtype=torch.int64, device=impl.device),
            torch.zeros(1, dtype=torch.int32, device=impl.device),
            *torch.zeros(2, 40, dtype=torch.int32, device=impl.device),
        )
        counters = torch.zeros(len(Count), dtype=torch.int64, device=impl.device)
        impl.ops.lookup_blocks(windows, batch, half, blocks, misses, counters)
        missing = torch.zeros(2 * PAGES * 2, dtype=torch.int64)
        missing[misses.pairs[: int(misses.count)].cpu()] = 1
        found.append(missing.view(2, PAGES, 2).transpose(1, 2).flatten(0, 1))  # [row, page]
    assert all(torch.equal(is_, should) for is_, should in by_row(*found))
    assert found[0].sum() > 0
