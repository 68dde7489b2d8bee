"""A list has what a window always has, and between it the groups whose bounds promise most."""

from __future__ import annotations

import pytest
import torch

from freekv_kernels import GROUP_PAGES, Half, list_width
from tests.support import fp8
from tests.support.op_tables import batch_of

FREE = -7  # what nobody may overwrite
SCALE = 0.3


def inputs(impl, num_pages, heads=2, group=3, dim=16, dtype=torch.float32):
    """Queries, summaries and a page table of requests that share no page, with random pages past their own."""
    batch, longest = len(num_pages), max(num_pages)
    queries = torch.randn(batch + 1, 2, heads, group, dim).to(impl.device, dtype)[:, 1]
    summary = fp8.bounds(torch.randn(batch * longest + 1, heads, 2, dim).sort(2).values).to(impl.device)
    table = 1 + torch.randperm(batch * longest).view(batch, longest)
    return queries, summary, table.to(impl.device)


def no_windows(queries):
    """Front windows of rows that have none yet."""
    return torch.full((2, len(queries), queries.shape[1], 3), -1, dtype=torch.int32, device=queries.device)


def free_lists(impl, num_rows, width):
    return torch.full((num_rows, width), FREE, dtype=torch.int32, device=impl.device)


def group_scores(q, low, high):
    """Pooled score of each group: q ``[group_size, head_dim]``, bounds ``[num_groups, head_dim]``."""
    promise = q @ ((low + high) / 2).T + 0.5 * (q.abs() @ ((high - low) / 2).T)
    return (SCALE * promise).softmax(1).mean(0)


def expected_list(queries, summary, batch, row, num_kv_heads, candidates, sink, recent, width):
    """By the definition, padded."""
    b, h = divmod(row, num_kv_heads)
    num_pages, budget = int(batch.num_pages[b]), int(batch.budget_pages[b, h])
    if num_pages <= width:
        listed = list(range(num_pages))
    else:
        begin, end = -(-sink // 4), (num_pages - recent) // 4
        last_pages = batch.page_table[b].cpu()[3::4][begin:end]
        low, high = fp8.numbers(summary.cpu()[last_pages, h]).unbind(1)
        scores = group_scores(queries[batch.rows[b], h].double().cpu(), low, high)
        room = width - 4 * begin - (num_pages - 4 * end)
        num_best = min(-(-candidates * (budget - sink - recent) // 4), room // 4)
        best = sorted((begin + scores.topk(num_best).indices).tolist())
        listed = [*range(4 * begin), *(4 * i + j for i in best for j in range(4)), *range(4 * end, num_pages)]
    return listed + [-1] * (width - len(listed))


def check(impl, inputs, batch, sink, recent, candidates, width, half=Half.FRONT, rows=None):
    """Lists of all rows are as expected in `rows`, by default all, and untouched in the others."""
    queries, summary, _ = inputs
    num_kv_heads = summary.shape[1]
    pages = free_lists(impl, len(batch.rows) * num_kv_heads, width)
    args = (candidates, sink, recent, no_windows(queries))
    impl.ops.list_candidates(queries, summary, batch, half, SCALE, *args, pages)
    for row in range(len(pages)):
        expected = [FREE] * width
        if rows is None or row in rows:
            expected = expected_list(queries, summary, batch, row, num_kv_heads, candidates, sink, recent, width)
        assert pages[row].tolist() == expected, row


@pytest.mark.parametrize(
    "heads, group, dim, dtype",
    [(2, 3, 16, torch.float32), (1, 1, 96, torch.float16), (3, 8, 40, torch.float32), (1, 16, 128, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("sink, recent", [(4, 4), (0, 1), (2, 3), (5, 6)])
def test_sink_and_latest_pages_are_listed_and_between_them_the_best_groups(
    impl, heads, group, dim, dtype, sink, recent
):
    """Of long requests; of short ones every page is."""
    width = list_width(2, 5, sink, recent)
    num_pages = [61, width, width + 1, 90]
    given = inputs(impl, num_pages, heads, group, dim, dtype)
    budget = sink + recent + 5
    batch = batch_of(given[2], num_pages, [budget] * 4, rows=[3, 1, 4, 2], num_kv_heads=heads)
    check(impl, given, batch, sink, recent, 2, width)


@pytest.mark.parametrize("past", range(4))
def test_whatever_is_recent_in_this_step_or_the_next_is_listed(impl, past):
    num_pages = 64 + past
    given = inputs(impl, [num_pages])
    for recent in (1, 2, 3, 4):
        pages = free_lists(impl, 2, list_width(1, 4, 1, recent))
        batch = batch_of(given[2], [num_pages], [5 + recent], num_pages_next=[num_pages + 1])
        impl.ops.list_candidates(*given[:2], batch, Half.BACK, SCALE, 1, 1, recent, no_windows(given[0]), pages)
        for row in pages.tolist():
            assert set(range(num_pages - recent, num_pages)) <= set(row)


def test_each_head_lists_by_its_own_budget_and_none_lists_more_than_fits(impl):
    given = inputs(impl, [80, 80])
    width = list_width(3, 6, 4, 4)
    budgets = [[14, 8], [9, 60]]  # as many as the width is for; nothing is selected; one page; more than there is room
    batch = batch_of(given[2], [80, 80], budgets)
    check(impl, given, batch, 4, 4, 3, width)
    check(impl, given, batch, 4, 4, 3, width + 5)


def test_rows_within_their_budget_and_padding_keep_their_lists(impl):
    num_pages = [40, 40, 12, 0]
    given = inputs(impl, num_pages)
    batch = batch_of(given[2], num_pages, [[40, 12], 50, 12, 12], rows=[1, 2, 3, 0])
    check(impl, given, batch, 4, 2, 1, list_width(1, 6, 4, 2), rows=[1])


def test_the_step_that_reads_decides_whether_a_request_is_over_its_budget(impl):
    given = inputs(impl, [40])
    batch = batch_of(given[2], [40], [40], num_pages_next=[41])
    for half in Half:
        rows = [] if half == Half.FRONT else None
        check(impl, given, batch, 4, 2, 1, 48, half, rows)
    assert batch.num_pages[0] <= 48, "all of its pages are listed"


def test_requests_that_share_pages_list_by_their_own_queries(impl):
    queries, summary, table = inputs(impl, [70, 70, 70])
    table[1, :48], table[2, :64] = table[0, :48], table[0, :64]
    batch = batch_of(table, [70, 66, 70], [12, 12, 14])
    check(impl, (queries, summary, table), batch, 4, 4, 2, list_width(2, 6, 4, 4))


@pytest.mark.parametrize("half", [Half.FRONT, Half.BACK])
def test_groups_with_a_page_of_the_front_window_come_first(impl, half):
    sink, recent, width = 4, 4, list_width(2, 6, 4, 4)
    queries, summary, table = inputs(impl, [100])
    batch = batch_of(table, [100], [14], step=3)
    windows = no_windows(queries).repeat(1, 1, 1, 5)
    held = [[0, 1, 2, 3, 9, 41, 43, 77, 96, 97, 98, 99], [0, 1, 2, 3, 12, 50, 96, 97, 98, 99, -1, -1]]
    windows[1, 1, :, :12] = torch.tensor(held, dtype=torch.int32)
    windows[0] = 60  # of the back; nobody asks for it
    pages = free_lists(impl, 2, width)
    impl.ops.list_candidates(queries, summary, batch, half, SCALE, 2, sink, recent, windows, pages)
    for row, window in enumerate(held):
        groups = {page // 4 for page in pages[row].tolist() if 4 <= page < 96}
        first = {page // 4 for page in window if 4 <= page < 96}
        plain = expected_list(queries, summary, batch, row, 2, 2, sink, recent, width)
        best = {page // 4 for page in plain if 4 <= page < 96}
        assert first <= groups and len(groups) == len(best) == 3, "as many as without a window"
        assert len(groups - first - best) == 0, "the others are the best"


def test_first_windows_have_no_window_before_them(impl):
    queries, summary, table = inputs(impl, [100])
    batch, width = batch_of(table, [100], [14]), list_width(2, 6, 4, 4)
    found, wanted = free_lists(impl, 2, width), free_lists(impl, 2, width)
    args = (queries, summary, batch, Half.BOTH, SCALE, 2, 4, 4)
    impl.ops.list_candidates(*args, no_windows(queries).fill_(41), found)
    impl.ops.list_candidates(*args, no_windows(queries), wanted)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("num_programs", [1, 7, 1000])
def test_programs_share_all_groups_of_long_requests(impl, monkeypatch, num_programs):
    monkeypatch.setattr("freekv_kernels.list_candidates_triton.NUM_PROGRAMS", num_programs)
    num_pages = [5000, 9001]
    given = inputs(impl, num_pages, heads=1, group=1, dim=64)
    batch = batch_of(given[2], num_pages, [12, 12], num_kv_heads=1)
    check(impl, given, batch, 4, 4, 2, list_width(2, 4, 4, 4))


def test_equal_groups_are_taken_as_often_as_there_is_room(impl):
    queries, summary, table = inputs(impl, [64])
    summary[:] = summary[:1].clone()
    width = list_width(2, 6, 4, 4)
    pages = free_lists(impl, 2, width)
    batch = batch_of(table, [64], [14])
    impl.ops.list_candidates(queries, summary, batch, Half.FRONT, SCALE, 2, 4, 4, no_windows(queries), pages)
    for row in pages.tolist():
        listed = [page for page in row if page >= 0]
        assert listed == sorted(set(listed)) and len(listed) == 4 + 12 + 4 and row[len(listed) :] == [-1] * 4
        assert all(listed[i] % 4 == 0 and listed[i + 3] == listed[i] + 3 for i in range(0, len(listed), 4))


def test_far_scores_neither_overflow_nor_tie(impl):
    given = inputs(impl, [64])
    batch = batch_of(given[2], [64], [14])
    pages, wanted = free_lists(impl, 2, 32), free_lists(impl, 2, 32)
    one = given[0][:, :, :1].contiguous()  # of one head, the order of groups does not depend on the size of its query
    args = (given[1], batch, Half.FRONT, SCALE, 2, 4, 4, no_windows(one))
    impl.ops.list_candidates(one * 1e3, *args, pages)
    impl.ops.list_candidates(one, *args, wanted)
    assert torch.equal(pages, wanted)


def test_a_workspace_of_its_own_changes_nothing_else(impl):
    queries, summary, table = inputs(impl, [64, 50])
    batch = batch_of(table, [64, 50], [14, 14])
    workspace = torch.full((4, 5, 40), float("nan"), device=impl.device)
    found, wanted = free_lists(impl, 4, 32), free_lists(impl, 4, 32)
    args = (queries, summary, batch, Half.FRONT, SCALE, 2, 4, 4, no_windows(queries))
    impl.ops.list_candidates(*args, found, workspace[:, :3, :17])
    impl.ops.list_candidates(*args, wanted)
    assert torch.equal(found, wanted)
    assert workspace[:, 3:].isnan().all() and workspace[:, :, 17:].isnan().all()


@pytest.mark.parametrize("sink", range(6))
@pytest.mark.parametrize("recent", [1, 2, 4, 7])
def test_a_list_is_wide_enough_for_its_candidates_at_any_length(sink, recent):
    for candidates, selected in ((1, 1), (2, 5), (5, 8)):
        width = list_width(candidates, selected, sink, recent)
        assert width % GROUP_PAGES == 0
        for num_pages in range(width + 1, width + 9):
            always = -(-sink // 4) * 4 + num_pages - (num_pages - recent) // 4 * 4
            assert always + -(-candidates * selected // 4) * 4 <= width
