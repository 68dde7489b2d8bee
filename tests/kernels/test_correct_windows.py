"""A row is corrected where its window lacks more of the attention than the gate: compared with a loop."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from freekv_kernels import PLAIN, REFERENCE, Batch, Count, Half, PageStore
from tests.support.op_tables import batch_of, flags_of

HEADS, SINK, RECENT, FREE, PAGE, DIM, SCALE = 2, 1, 2, -7, 16, 16, 0.3


class Step(NamedTuple):
    """What a step finds: random masses, and windows with pages at random."""

    scores: torch.Tensor
    queries: torch.Tensor
    store: PageStore
    batch: Batch
    front_budgets: torch.Tensor
    windows: torch.Tensor

    def to(self, impl) -> Step:
        """A copy of what an op writes, and the rest."""
        return self._replace(
            scores=self.scores.to(impl.device, copy=True), windows=self.windows.to(impl.device, copy=True)
        )


def make(impl, num_pages, budgets, width, columns=None, step=5, following=None, front_budgets=None, group=2):
    requests = len(num_pages)
    front_budgets = front_budgets or budgets
    scores = torch.randn(requests * HEADS, group, columns or max(num_pages)).mul(2)
    windows = torch.full((2, requests + 2, HEADS, width), FREE, dtype=torch.int32)
    for b, (n, budget) in enumerate(zip(num_pages, front_budgets, strict=True)):
        for h in range(HEADS):
            num_read = min(n, budget)
            inner = sorted((SINK + torch.randperm(n - SINK - RECENT)[: num_read - SINK - RECENT]).tolist())
            window = [*range(SINK), *inner, *range(n - RECENT, n)] if n > budget else list(range(n))
            windows[step % 2, b + 1, h] = torch.tensor(window + [-1] * (width - num_read))
    host = impl.host(torch.randn(requests, HEADS, 2, PAGE, DIM) * 2)
    absent = torch.full((requests, HEADS), -1, dtype=torch.int32, device=impl.device)
    store = PageStore(host, None, torch.empty(0, 2, PAGE, DIM, device=impl.device), absent, PLAIN)
    latest = torch.arange(requests, device=impl.device)  # the host page of all of a request's pages; the last is read
    page_table = latest[:, None].expand(-1, max(num_pages)).contiguous()
    batch = batch_of(page_table, num_pages, budgets, step=step, num_pages_next=following)
    batch = batch._replace(slots=latest * PAGE + 4)
    queries = torch.randn(requests + 1, HEADS, group, DIM).to(impl.device)
    front_budgets = torch.tensor(front_budgets, device=impl.device)[:, None].expand(-1, HEADS).contiguous()
    return Step(scores, queries, store, batch, front_budgets, windows)


def shares_of(step, pages=None):
    """Of each row: `share_pages` has tests of its own."""
    shares = step.scores.clone()
    on_host = step.store._replace(block_kv=step.store.block_kv.cpu(), table=step.store.table.cpu())
    batch = Batch(*(x.cpu() for x in step.batch[:7]))
    REFERENCE.share_pages(shares, step.queries.cpu(), on_host, batch, Half.BACK, SCALE, None, pages)
    return shares[:, :1]


def run(impl, step, gate, hysteresis=0.0, pages=None, *paced):
    """Flagged rows, and the windows and the shares afterwards."""
    flags = flags_of([], len(step.scores), impl.device)
    flags.is_flagged.fill_(True)
    counters = torch.zeros(len(Count), dtype=torch.int64, device=impl.device)
    pages = None if pages is None else pages.to(impl.device)
    own = step.to(impl)
    rule = (SCALE, gate, SINK, RECENT, own.windows, flags, counters, hysteresis, pages)
    impl.ops.correct_windows(*own[:5], *rule, *paced)
    listed = sorted(flags.rows[: int(flags.count)].tolist())
    assert listed == flags.is_flagged.nonzero().flatten().tolist()
    assert int(counters[Count.FLAGGED_ROWS]) == len(listed) == int(counters.sum())
    return listed, own.windows.cpu(), own.scores[:, :1].cpu()


def expected(step, hysteresis, pages=None):
    """What each row over its budget would lose, and the window that it would choose."""
    shares, front = shares_of(step, pages), int(step.batch.step) % 2
    for b, n in enumerate(step.batch.num_pages.tolist()):
        for h in range(HEADS):
            row, budget = b * HEADS + h, int(step.front_budgets[b, h])
            if n <= budget or step.batch.num_pages_next[b] <= step.batch.budget_pages[b, h]:
                continue
            listed = range(shares.shape[2]) if pages is None else pages[row].tolist()
            own = {p: float(shares[row, 0, c]) for c, p in enumerate(listed) if SINK <= p < n - RECENT}
            held = set(step.windows[front, b + 1, h].tolist()) & set(own)
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


def middle_gate(rows):
    """Half of the rows lose more."""
    losses = sorted(lost for _, lost, _ in rows)
    return (losses[len(losses) // 2 - 1] + losses[len(losses) // 2]) / 2


@pytest.mark.parametrize("hysteresis", [0.0, 0.7])
@pytest.mark.parametrize("is_listed", [False, True], ids=["every-page", "listed"])
@pytest.mark.parametrize("num_pages, budgets", [([40, 31, 700], [9, 12, 9]), ([12, 30], [12, 13])], ids=str)
def test_rows_that_would_lose_more_are_selected_again_and_no_others(impl, num_pages, budgets, is_listed, hysteresis):
    num_listed = 24 if is_listed else None
    step = make(impl, num_pages, budgets, 13, num_listed)
    pages = listed_pages(num_pages, num_listed) if is_listed else None
    rows = list(expected(step, hysteresis, pages))
    gate = middle_gate(rows)
    flagged, written, _ = run(impl, step, gate, hysteresis, pages)
    assert flagged == [row for row, lost, _ in rows if lost > gate] and 0 < len(flagged) < len(rows)
    after = step.windows.clone()
    for row, lost, window in rows:
        if lost > gate:
            after[1, row // HEADS + 1, row % HEADS, : len(window)] = torch.tensor(window)
    assert torch.equal(written[1], after[1])


@pytest.mark.parametrize("gate", [-1.0, 0.05, 1.0])
@pytest.mark.parametrize("is_listed", [False, True], ids=["every-page", "listed"])
@pytest.mark.parametrize(
    "num_pages, following, budgets, front_budgets",
    [
        ([40, 31, 700], None, [9, 12, 9], None),
        ([40, 31, 700], [41, 31, 701], [9, 12, 9], None),
        ([40, 12, 30], [40, 13, 31], [9, 12, 9], None),  # the second is over its budget from the next step on
        ([40, 31, 700], [40, 32, 700], [9, 12, 9], [12, 9, 9]),
        ([40, 12, 700], None, [9, 12, 9], [9, 9, 9]),  # the second was over a budget that it no longer has
    ],
    ids=["same-pages", "page-opens", "over-next", "other-budgets", "within-now"],
)
def test_back_windows_and_shares_are_those_of_the_ops_one_by_one(
    impl, num_pages, following, budgets, front_budgets, is_listed, gate
):
    num_listed = 24 if is_listed else None
    step = make(impl, num_pages, budgets, 13, num_listed, following=following, front_budgets=front_budgets)
    pages = listed_pages(num_pages, num_listed) if is_listed else None
    flagged, written, shares = run(impl, step, gate, 0.5, pages)
    found, is_over = shares_of(step, pages), step.batch.num_pages_next[:, None] > step.batch.budget_pages
    listed = torch.arange(found.shape[2]).expand(len(found), -1) if pages is None else pages
    is_shared = (listed >= 0) & (listed < torch.tensor(num_pages).repeat_interleave(HEADS)[:, None])
    is_shared &= is_over.flatten().cpu()[:, None]
    assert torch.allclose(shares[:, 0][is_shared], found[:, 0][is_shared], atol=1e-5)
    windows = written.clone()  # with the corrected fronts
    windows[0] = FREE
    rule = (SINK, RECENT, "mean", windows, None, 1.0, 0.5, pages)
    batch = Batch(*(x.cpu() for x in step.batch[:7]))
    REFERENCE.select_pages(found.clone(), batch, Half.BACK, *rule)
    assert torch.equal(written, windows)
    assert gate > 0 or len(flagged) >= 2


@pytest.mark.parametrize("gate, share", [(1.0, 0), (-1.0, 1)], ids=["never", "always"])
def test_a_gate_of_everything_never_opens_and_one_of_less_than_nothing_always_does(impl, gate, share):
    step = make(impl, [40, 40], [9, 9], 9)
    flagged, written, _ = run(impl, step, gate)
    assert len(flagged) == share * 4
    assert torch.equal(written[1], step.windows[1]) == (share == 0)


def test_a_window_that_has_the_best_pages_loses_nothing(impl):
    step = make(impl, [40, 40], [9, 9], 9)
    for row, _, window in expected(step, 0.0):
        step.windows[1, row // HEADS + 1, row % HEADS] = torch.tensor(window)
    flagged, written, _ = run(impl, step, 1e-6)
    assert not flagged and torch.equal(written[1], step.windows[1])


def test_corrected_rows_have_the_window_that_select_pages_writes(impl):
    step = make(impl, [40, 33], [9, 7], 9)
    _, written, _ = run(impl, step, -1.0, 0.5)
    selected = step.windows.to(impl.device, copy=True)
    args = (step.batch, Half.FRONT, SINK, RECENT, "mean", selected, None, 1.0, 0.5)
    impl.ops.select_pages(shares_of(step).to(impl.device), *args)
    assert torch.equal(written[1], selected[1].cpu())


def test_padding_is_not_flagged(impl):
    step = make(impl, [40, 40], [9, 9], 9)
    none = step.batch.num_pages * 0
    step = step._replace(batch=step.batch._replace(num_pages=none, num_pages_next=none))
    flagged, written, _ = run(impl, step, -1.0)
    assert not flagged and torch.equal(written, step.windows)


def paced(impl, step, due, interval, max_interval=8):
    """The rows that are due, and a pace of so many steps for every row."""
    rows = flags_of(due, len(step.scores), impl.device)
    rows.is_flagged[due] = True
    pace = torch.tensor([interval, 0], dtype=torch.int32).expand(len(step.windows[0]), HEADS, 2)
    return rows, pace.to(impl.device, copy=True).contiguous(), max_interval


@pytest.mark.parametrize("following", [None, [40, 32, 700]], ids=["same-pages", "page-opens"])
def test_rows_that_are_not_due_keep_their_windows_and_the_others_are_as_in_every_step(impl, following):
    due = [1, 2, 3] if following else [1, 3, 4]  # a page opens in due rows only
    step = make(impl, [40, 31, 700], [9, 12, 9], 13, following=following)
    gate = middle_gate([row for row in expected(step, 0.5) if row[0] in due])
    flagged, everywhere, _ = run(impl, step, gate, 0.5)
    flagged_of_due, written, _ = run(impl, step, gate, 0.5, None, *paced(impl, step, due, 1))
    assert flagged_of_due == [row for row in flagged if row in due] and flagged_of_due
    for row in range(6):
        own = (slice(None), row // HEADS + 1, row % HEADS)
        front = step.windows[1][own[1:]]
        assert torch.equal(written[own], everywhere[own] if row in due else front.expand(2, -1))


@pytest.mark.parametrize("max_interval", [1, 6, 64])
def test_a_due_row_that_lacks_little_is_scored_after_twice_the_steps_and_one_that_lacks_more_at_once(
    impl, max_interval
):
    step = make(impl, [40, 31, 700, 12], [9, 12, 9, 12], 13, following=[40, 31, 700, 13])
    lost = {row: lost for row, lost, _ in expected(step, 0.0)}
    gate = 2 * sorted(lost.values())[2] + 1e-6  # of six rows that are judged three lack no more than half of it
    due = [0, 1, 2, 4, 5, 6]  # the fourth request is over its budget from the next step on, and not judged
    rows, pace, _ = paced(impl, step, due, 4)
    run(impl, step, gate, 0.0, None, rows, pace, max_interval)
    for row in range(8):
        interval = min(8, max_interval) if lost.get(row, 1.0) <= gate / 2 else 1
        after = pace[row // HEADS + 1, row % HEADS].tolist()
        assert after == ([interval, interval - 1] if row in due else [4, 0]), row
