"""A row is corrected where its window lacks more of the attention than the gate: compared with a loop."""

from __future__ import annotations

import pytest
import torch

from freekv_kernels import Count, Half
from tests.support.op_tables import batch_of, flags_of

HEADS, SINK, RECENT, FREE = 2, 1, 2, -7


def make(impl, num_pages, budgets, width, columns=None, step=5):
    """Random shares, windows and flags that a step finds; windows have pages at random."""
    requests = len(num_pages)
    shares = torch.randn(requests * HEADS, 1, columns or max(num_pages)).mul(2).log_softmax(-1)
    windows = torch.full((2, requests + 2, HEADS, width), FREE, dtype=torch.int32)
    for b, (n, budget) in enumerate(zip(num_pages, budgets, strict=True)):
        for h in range(HEADS):
            num_read = min(n, budget)
            inner = sorted((SINK + torch.randperm(n - SINK - RECENT)[: num_read - SINK - RECENT]).tolist())
            window = [*range(SINK), *inner, *range(n - RECENT, n)] if n > budget else list(range(n))
            windows[step % 2, b + 1, h] = torch.tensor(window + [-1] * (width - num_read))
    no_table = torch.zeros(1, 1, dtype=torch.int64, device=impl.device)
    return shares, windows, batch_of(no_table, num_pages, budgets, step=step)


def run(impl, shares, batch, gate, windows, hysteresis=0.0, pages=None):
    """Flagged rows, their count, the counter, the windows afterwards and the shares afterwards."""
    flags = flags_of([], len(shares), impl.device)
    flags.is_flagged.fill_(True)
    counters = torch.zeros(len(Count), dtype=torch.int64, device=impl.device)
    own, written = shares.to(impl.device, copy=True), windows.to(impl.device, copy=True)
    pages = None if pages is None else pages.to(impl.device)
    impl.ops.correct_windows(own, batch, gate, SINK, RECENT, written, flags, counters, hysteresis, pages)
    listed = sorted(flags.rows[: int(flags.count)].tolist())
    assert listed == flags.is_flagged.nonzero().flatten().tolist()
    assert int(counters[Count.FLAGGED_ROWS]) == len(listed) == int(counters.sum())
    return listed, written.cpu(), own.cpu()


def expected(shares, batch, windows, hysteresis, pages=None):
    """What each row over its budget would lose, and the window that it would choose."""
    front = int(batch.step) % 2
    for b, n in enumerate(batch.num_pages.tolist()):
        for h in range(HEADS):
            row, budget = b * HEADS + h, int(batch.budget_pages[b, h])
            if n <= budget:
                continue
            listed = range(shares.shape[2]) if pages is None else pages[row].tolist()
            own = {p: float(shares[row, 0, c]) for c, p in enumerate(listed) if SINK <= p < n - RECENT}
            held = set(windows[front, b + 1, h].tolist()) & set(own)
            rank = sorted(own, key=lambda p: own[p] + hysteresis * (p in held), reverse=True)
            best = sorted(rank[: budget - SINK - RECENT])
            exp = {p: torch.tensor(x).double().exp().item() for p, x in own.items()}
            yield row, sum(exp[p] for p in best) - sum(exp[p] for p in held), [*range(SINK), *best, n - 2, n - 1]


def listed_pages(num_pages, num_listed):
    """A list of each row: sink, some, recent; ascending, -1 padded."""
    pages = torch.full((len(num_pages) * HEADS, num_listed), -1, dtype=torch.int32)
    for row, own in enumerate(pages):
        n = num_pages[row // HEADS]
        num_others = [num_listed - 5, 9][row % 2]  # the list of every second row ends early
        some = sorted((SINK + torch.randperm(n - SINK - RECENT)[:num_others]).tolist())
        some = [*range(SINK), *some, *range(n - RECENT, n)]
        own[: len(some)] = torch.tensor(some)
    return pages


@pytest.mark.parametrize("hysteresis", [0.0, 0.7])
@pytest.mark.parametrize("is_listed", [False, True], ids=["every-page", "listed"])
@pytest.mark.parametrize("num_pages, budgets", [([40, 31, 700], [9, 12, 9]), ([12, 30], [12, 13])], ids=str)
def test_rows_that_would_lose_more_are_selected_again_and_no_others(impl, num_pages, budgets, is_listed, hysteresis):
    num_listed = 24 if is_listed else None
    shares, windows, batch = make(impl, num_pages, budgets, 13, num_listed)
    pages = listed_pages([max(n, 24) for n in num_pages], num_listed) if is_listed else None
    rows = list(expected(shares, batch, windows, hysteresis, pages))
    losses = sorted(lost for _, lost, _ in rows)
    gate = (losses[len(losses) // 2 - 1] + losses[len(losses) // 2]) / 2
    flagged, written, shares_after = run(impl, shares, batch, gate, windows, hysteresis, pages)
    assert flagged == [row for row, lost, _ in rows if lost > gate] and 0 < len(flagged) < len(rows)
    after = windows.clone()
    for row, lost, window in rows:
        if lost > gate:
            after[1, row // HEADS + 1, row % HEADS, : len(window)] = torch.tensor(window)
    assert torch.equal(written[1], after[1])
    assert torch.allclose(shares_after, shares)


@pytest.mark.parametrize("gate, share", [(1.0, 0), (-1.0, 1)], ids=["never", "always"])
def test_a_gate_of_everything_never_opens_and_one_of_less_than_nothing_always_does(impl, gate, share):
    shares, windows, batch = make(impl, [40, 40], [9, 9], 9)
    flagged, written, _ = run(impl, shares, batch, gate, windows)
    assert len(flagged) == share * 4
    assert torch.equal(written[1], windows[1]) == (share == 0)


def test_a_window_that_has_the_best_pages_loses_nothing(impl):
    shares, windows, batch = make(impl, [40, 40], [9, 9], 9)
    for row, _, window in expected(shares, batch, windows, 0.0):
        windows[1, row // HEADS + 1, row % HEADS] = torch.tensor(window)
    flagged, written, _ = run(impl, shares, batch, 1e-6, windows)
    assert not flagged and torch.equal(written[1], windows[1])


def test_corrected_rows_have_the_window_that_select_pages_writes(impl):
    shares, windows, batch = make(impl, [40, 33], [9, 7], 9)
    _, written, _ = run(impl, shares, batch, -1.0, windows, 0.5)
    selected = windows.to(impl.device, copy=True)
    args = (batch, Half.FRONT, SINK, RECENT, "mean", selected, None, 1.0, 0.5)
    impl.ops.select_pages(shares.to(impl.device, copy=True), *args)
    assert torch.equal(written[1], selected[1].cpu())


def test_padding_is_not_flagged(impl):
    shares, windows, batch = make(impl, [40, 40], [9, 9], 9)
    batch = batch._replace(num_pages=batch.num_pages * 0, num_pages_next=batch.num_pages * 0)
    flagged, written, _ = run(impl, shares, batch, -1.0, windows)
    assert not flagged and torch.equal(written, windows)
