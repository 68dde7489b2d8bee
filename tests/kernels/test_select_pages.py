"""A window is sink, best pages, recent: compared with a selection written as a loop."""

from __future__ import annotations

import math

import pytest
import torch

from freekv_kernels import Half
from freekv_kernels.select_pages import POOLINGS
from tests.support.op_tables import batch_of, flags_of

FREE = -7  # what nobody may overwrite
SCALE = 0.3  # of logits


def expected_window(scores, n, budget, sink, recent, width, pooling, held=(), hysteresis=0.0):
    """One (request, KV head); scores [group_size, max_pages]; `held` pages have a bonus."""
    if n <= budget:
        pages = list(range(n))
    else:
        candidates = range(sink, n - recent)
        if pooling in ("scaled", "max"):
            scores = [[SCALE * x for x in s] for s in scores]
        peaks = [max(s[c] for c in candidates) for s in scores]
        totals = [sum(math.exp(s[c] - m) for c in candidates) for s, m in zip(scores, peaks, strict=True)]

        def pooled(page):
            bonus = hysteresis * (page in held)
            if pooling == "mean":
                return sum(s[page] for s in scores) / len(scores) + bonus
            shares = [math.exp(s[page] - m) / t for s, m, t in zip(scores, peaks, totals, strict=True)]
            return (max(shares) if pooling == "max" else sum(shares)) * math.exp(bonus)

        best = sorted(candidates, key=pooled, reverse=True)[: budget - sink - recent]
        pages = [*range(sink), *sorted(best), *range(n - recent, n)]
    return pages + [-1] * (width - len(pages))


def no_table(impl):
    """Selection asks for no host page."""
    return torch.zeros(1, 1, dtype=torch.int64, device=impl.device)


def free_windows(requests, heads, width, device):
    """One layer of three; rows of the request table: padding, and one more than there are requests."""
    return torch.full((2, 3, requests + 2, heads, width), FREE, dtype=torch.int32, device=device)


def selected(impl, scores, n, budget, sink, recent, pooling):
    """The window of one (request, KV head); scores [group_size, max_pages]."""
    windows = free_windows(1, 1, budget, impl.device)[:, 1]
    batch = batch_of(no_table(impl), [n], [budget], num_kv_heads=1)
    workspace = scores[None].to(impl.device, copy=True)
    impl.ops.select_pages(workspace, batch, Half.FRONT, sink, recent, pooling, windows, scale=SCALE)
    return windows[0, 1, 0].tolist()


CASES = [  # pages of each request, budgets, sink, recent, width, reader
    pytest.param([9, 20, 31], [8, 8, 8], 2, 3, 8, Half.FRONT, id="all-over"),
    pytest.param([1, 8, 9], [8, 8, 8], 1, 1, 8, Half.BACK, id="one-page-at-and-over-the-budget"),
    pytest.param([1, 8, 9], [8, 8, 8], 1, 1, 8, Half.BOTH, id="first-windows"),
    pytest.param([30, 30, 5], [6, 10, 10], 2, 2, 12, Half.BOTH, id="own-budgets"),
    pytest.param([30, 12], [9, 9], 0, 1, 9, Half.BACK, id="no-sink"),
    pytest.param([30, 5, 4], [4, 4, 4], 1, 3, 4, Half.FRONT, id="nothing-selected"),
    pytest.param([30, 5], [3, 3], 0, 3, 6, Half.BACK, id="recent-only"),
    pytest.param([33], [8], 1, 2, 8, Half.BACK, id="page-not-opened-yet"),
    pytest.param([10], [9], 1, 1, 40, Half.BOTH, id="wide-window"),
    pytest.param([700], [64], 1, 2, 64, Half.FRONT, id="many-pages"),
]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("num_pages, budgets, sink, recent, width, half", CASES)
def test_the_window_equals_the_loop_and_nothing_else_is_written(
    impl, num_pages, budgets, sink, recent, width, half, pooling
):
    heads, requests = 2, len(num_pages)
    max_pages = max(num_pages) - (half != Half.FRONT)  # the next step's last page may be yet to be opened
    scores = torch.randn(requests * heads, 3, max_pages)
    windows = free_windows(requests, heads, width, impl.device)
    rows = list(range(requests, 0, -1))
    batch = batch_of(no_table(impl), num_pages, budgets, rows, step=5)
    workspace = scores.to(impl.device, copy=True)
    impl.ops.select_pages(workspace, batch, half, sink, recent, pooling, windows[:, 1], scale=SCALE)

    expected = torch.full_like(windows, FREE, device="cpu")
    halves = {Half.FRONT: [1], Half.BACK: [0], Half.BOTH: [0, 1]}[half]  # of step 5
    for b, (row, n, budget) in enumerate(zip(rows, num_pages, budgets, strict=True)):
        for h in range(heads):
            args = (scores[b * heads + h].double().tolist(), n, budget, sink, recent, width, pooling)
            for index in halves if n > budget or half == Half.BOTH else []:
                expected[index, 1, row, h] = torch.tensor(expected_window(*args))
    assert torch.equal(windows.cpu(), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("group, max_pages", [(1, 40), (4, 4640), (8, 40), (16, 2503)], ids=str)
def test_groups_of_any_size_and_contexts_of_any_length(impl, group, max_pages, pooling):
    scores = 5 * torch.randn(group, max_pages)
    n, budget, sink, recent = max_pages - 1, 30, 1, 2
    expected = expected_window(scores.double().tolist(), n, budget, sink, recent, budget, pooling)
    assert selected(impl, scores, n, budget, sink, recent, pooling) == expected


@pytest.mark.parametrize("half", [Half.FRONT, Half.BACK])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("hysteresis", [0.5, 3.0])
@pytest.mark.parametrize("group, max_pages", [(1, 40), (3, 700)], ids=str)
def test_pages_that_the_front_window_has_are_worth_so_much_more(impl, half, pooling, hysteresis, group, max_pages):
    n, budget, sink, recent = max_pages - 1, 13, 1, 2
    batch = batch_of(no_table(impl), [n], [budget], num_pages_next=[n + 1], step=5, num_kv_heads=1)
    pages_read = n + (half == Half.BACK)
    scores = torch.randn(1, group, max_pages)
    held = sorted((sink + torch.randperm(n - recent - sink)[: budget - sink - recent]).tolist())
    windows = free_windows(1, 1, budget, impl.device)[:, 1]
    windows[1, 1, 0] = torch.tensor(
        [*range(sink), *held, n - 2, n - 1]
    )  # n - 2 is recent no more when the back is read
    before = windows[1, 1, 0].tolist()
    workspace = scores.to(impl.device, copy=True)
    args = (sink, recent, pooling, windows, None, SCALE, hysteresis)
    impl.ops.select_pages(workspace, batch, half, *args)
    found = windows[1 if half == Half.FRONT else 0, 1, 0].tolist()
    fixed = (scores[0].double().tolist(), pages_read, budget, sink, recent, budget, pooling)
    assert found == expected_window(*fixed, before, hysteresis) != expected_window(*fixed)


def test_first_windows_have_no_pages_to_favour(impl):
    batch = batch_of(no_table(impl), [20], [8], num_kv_heads=1)
    windows = free_windows(1, 1, 8, impl.device)[:, 1]
    windows[:, 1, 0] = torch.arange(8)
    scores = torch.arange(20.0).view(1, 1, 20)
    args = (1, 1, "softmax", windows, None, 1.0, 100.0)
    impl.ops.select_pages(scores.to(impl.device, copy=True), batch, Half.BOTH, *args)
    assert (windows[:, 1, 0].cpu() == torch.tensor([0, *range(13, 20)])).all()


@pytest.mark.parametrize("step, front", [(4, 0), (7, 1)])
def test_the_step_tells_front_from_back(impl, step, front):
    for half, written in ((Half.FRONT, front), (Half.BACK, 1 - front)):
        windows = free_windows(1, 1, 8, impl.device)[:, 1]
        scores = torch.randn(1, 2, 20, device=impl.device)
        impl.ops.select_pages(
            scores, batch_of(no_table(impl), [20], [8], step=step, num_kv_heads=1), half, 1, 1, "softmax", windows
        )
        assert (windows[written, 1] >= 0).all() and (windows[1 - written] == FREE).all()


def test_the_step_that_reads_decides_how_many_pages_there_are(impl):
    batch = batch_of(no_table(impl), [8], [8], num_pages_next=[9], num_kv_heads=1)
    for half, last in ((Half.FRONT, FREE), (Half.BACK, 8), (Half.BOTH, 8)):
        windows = free_windows(1, 1, 8, impl.device)[:, 1]
        scores = torch.randn(1, 2, 8, device=impl.device)
        impl.ops.select_pages(scores, batch, half, 1, 2, "softmax", windows)
        assert windows[half % 2, 1, 0, -1] == last
        assert windows[half % 2, 1, 0, -2] == (FREE if half == Half.FRONT else 7)


@pytest.mark.parametrize("listed", [[], [3], [1, 0, 4, 2, 5, 3]], ids=str)
def test_of_a_list_only_its_rows_are_written_whatever_their_order(impl, listed):
    heads, scores = 2, torch.randn(6, 3, 40)
    num_pages, budgets = [40, 22, 31], [8, 7, 6]
    windows = free_windows(3, heads, 8, impl.device)
    flags = flags_of(listed, 6, impl.device)
    batch = batch_of(no_table(impl), num_pages, budgets)
    impl.ops.select_pages(scores.to(impl.device, copy=True), batch, Half.FRONT, 1, 2, "softmax", windows[:, 1], flags)
    expected = torch.full_like(windows, FREE, device="cpu")
    for row in listed:
        b, h = divmod(row, heads)
        window = expected_window(scores[row].double().tolist(), num_pages[b], budgets[b], 1, 2, 8, "softmax")
        expected[0, 1, b + 1, h] = torch.tensor(window)
    assert torch.equal(windows.cpu(), expected)


@pytest.mark.parametrize("half", [Half.FRONT, Half.BACK])
def test_padding_writes_nothing(impl, half):
    windows = free_windows(2, 2, 8, impl.device)
    batch = batch_of(no_table(impl), [20, 0, 0], [8, 0, 8], rows=[1, 0, 0])
    scores = torch.randn(6, 3, 20, device=impl.device)
    impl.ops.select_pages(scores, batch, half, 1, 1, "softmax", windows[:, 1])
    assert (windows[:, 1, 0] == FREE).all() and (windows[half % 2, 1, 1] != FREE).all()


@pytest.mark.parametrize("pooling", ["softmax", "mean"])
@pytest.mark.parametrize("max_pages", [64, 2500])
def test_equal_scores_still_give_distinct_pages(impl, pooling, max_pages):
    window = selected(impl, torch.zeros(16, max_pages), max_pages, 8, 1, 1, pooling)
    assert len(set(window)) == 8 and window == sorted(window)
    assert window[0] == 0 and window[-1] == max_pages - 1


@pytest.mark.parametrize("pooling", ["softmax", "mean"])
def test_a_tie_at_the_threshold_takes_no_place_of_a_better_page(impl, pooling):
    scores = torch.zeros(16, 2500)
    better = [3, 1400, 2490]
    scores[:, better] = 1.0
    scores[:, 2000:2100] = -1.0
    window = selected(impl, scores, 2500, 8, 1, 1, pooling)
    assert set(better) < set(window) and len(set(window)) == 8 and window == sorted(window)
    assert not set(window) & set(range(2000, 2100))


def test_far_pages_keep_their_order_where_a_softmax_would_underflow(impl):
    scores = torch.arange(0.0, 6400.0, 100.0)[None]
    assert selected(impl, scores, 64, 8, 1, 1, "softmax") == [0, *range(57, 63), 63]


@pytest.mark.parametrize("pooling", ["softmax", "mean"])
def test_scores_that_differ_in_their_last_bits_keep_their_order(impl, pooling):
    scores = torch.full((1, 64), 1.0).view(torch.int32) + torch.arange(64, dtype=torch.int32)
    scores = scores.view(torch.float32) * (64.0 if pooling == "softmax" else -1.0)
    window = selected(impl, scores, 64, 8, 1, 1, pooling)
    if pooling == "mean":
        assert window == [0, *range(1, 7), 63]
    else:
        assert len(set(window)) == 8  # what is subtracted may make neighbours equal


@pytest.mark.parametrize("pooling", ["softmax", "mean"])
def test_what_is_no_candidate_is_never_selected(impl, pooling):
    scores = torch.randn(3, 48)
    clean = selected(impl, scores, 21, 8, 1, 1, pooling)
    scores[:, 0], scores[:, 20:30], scores[:, 30:] = float("inf"), float("nan"), float("-inf")
    assert selected(impl, scores, 21, 8, 1, 1, pooling) == clean


@pytest.mark.parametrize("pooling", ["softmax", "mean"])
def test_scores_that_are_not_numbers_still_give_distinct_pages(impl, pooling):
    scores = torch.randn(3, 48)
    scores[1, 7:30] = float("nan")
    window = selected(impl, scores, 48, 8, 1, 1, pooling)
    assert len(set(window)) == 8 and window == sorted(window) and window[0] == 0 and window[-1] == 47


@pytest.mark.parametrize("pooling, second", [("softmax", 8), ("scaled", 9), ("max", 9)])
def test_the_scale_decides_between_the_second_choices_of_two_heads(impl, pooling, second):
    """Attention gives page 9 28 % of head 0, and page 8 16 % of head 1; without the scale it is 3.9 and 4.7 %."""
    scores = torch.zeros(2, 20)
    scores[0, 5], scores[0, 9], scores[1, 7], scores[1, 8] = 40.0, 36.8, 9.0, 6.0
    assert selected(impl, scores, 20, 5, 1, 1, pooling) == [0, 5, 7, second, 19]


def test_an_unknown_pooling_is_refused(impl):
    with pytest.raises(ValueError, match="expected one of softmax, scaled, max, mean, got 'median'"):
        selected(impl, torch.zeros(1, 9), 9, 4, 1, 1, "median")
