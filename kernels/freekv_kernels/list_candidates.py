"""List the pages of each row that are worth scoring one by one: those of the groups whose bounds promise most."""

from __future__ import annotations

import torch

from freekv_kernels.fp8 import decode_fp8
from freekv_kernels.score_pages import group_equal, listed_rows
from freekv_kernels.select_pages import front_windows, pool_group
from freekv_kernels.tables import GROUP_PAGES, Batch, Half

# Of the bound: a bound of many tokens is nobody's. Half of its width ranks groups better than all of it.
WIDTH_SHARE = 0.5
HELD_BONUS = 1000.0  # nats, more than any two groups differ by


def list_width(candidates: int, selected_pages: int, sink_pages: int, recent_pages: int) -> int:
    """Columns that a list needs for any number of pages, where `selected_pages` is the most that a row selects."""
    always = groups_of(sink_pages) + groups_of(recent_pages + GROUP_PAGES - 1)
    return GROUP_PAGES * (always + groups_of(candidates * selected_pages))


def groups_of(num_pages: int) -> int:
    """Groups that so many pages take."""
    return (num_pages + GROUP_PAGES - 1) // GROUP_PAGES


def list_candidates(
    queries: torch.Tensor,
    summary: torch.Tensor,
    batch: Batch,
    half: Half,
    scale: float,
    candidates: int,
    sink_pages: int,
    recent_pages: int,
    windows: torch.Tensor,
    pages: torch.Tensor,
    scores: torch.Tensor | None = None,
) -> None:
    """List pages for `score_pages`, in the rows over their budget: the first of two levels.

    A row whose pages all fit the list lists them all. Of any other, with n pages:
      always   the groups with a sink page, and all pages from the first group on that is not before the recent pages
      between  the best groups: as many as have ``candidates * (budget - sink - recent)`` pages, or fit the list
    With lo, hi = summary[page_table[b, 4i + 3], h], the bounds of group i:
      score[g, i] = scale * sum_d(q[d] * (lo[d] + hi[d]) / 2 + WIDTH_SHARE * |q[d]| * (hi[d] - lo[d]) / 2)
    and a group is as good as the mean over the query heads of its share, softmax over i of score[g, i]; groups with a
    page of the front window come first.

    Parameters
    ----------
    queries : model dtype, ``[max_requests + 1, num_kv_heads, group_size, head_dim]``, device
        Post-RoPE queries by row of the request table.
    summary : uint8, ``[num_host_pages, num_kv_heads, 2, head_dim]``, device
        With the bounds of groups, see `encode_pages`.
    batch : Batch
    half : Half
        A row is over its budget if its request's pages at that step are. Pages, and which of them are recent, are those
        of this step: what is recent in the next step is listed too.
    scale : float, of attention's logits
    candidates : int, >= 1
        Pages to list for each page to select.
    sink_pages, recent_pages : int
        recent_pages is at least 1, so that the groups before them are full.
    windows : int32, ``[2, max_requests + 1, num_kv_heads, max_budget_pages]``, device
        See `select_pages`; first windows, BOTH, have none before them.
    pages : int32, ``[batch_size * num_kv_heads, num_listed]``, device
        Written, in those rows: logical pages, ascending, -1 padded. `list_width` says how wide it must be.
    scores : float32, ``[batch_size * num_kv_heads, group_size, >= max_pages // GROUP_PAGES]``, device, optional
        Workspace of the kernel; rows may lie apart.

    Notes
    -----
    Equal groups may be taken in any order. Bounds miss a token among look-alikes, which codes find: what a window has
    found once stays a candidate. What a list is short of in groups that are partly sink or recent, it lists
    whole: at most 3 pages more at either end.
    """
    rows = listed_rows(batch, half, None)
    if len(rows) == 0:
        return
    num_kv_heads, num_columns = summary.shape[1], pages.shape[1]
    num_pages = batch.num_pages[rows // num_kv_heads, None]
    column = torch.arange(num_columns, device=rows.device)
    pages[rows] = torch.where(column < num_pages, column, -1).int()
    is_long = num_pages[:, 0] > num_columns
    rows, num_pages = rows[is_long], num_pages[is_long]
    if len(rows) == 0:
        return

    begin, end = groups_of(sink_pages), (num_pages - recent_pages) // GROUP_PAGES  # of the groups to choose from
    group = torch.arange(int(end.max()), device=rows.device)
    is_candidate = (group >= begin) & (group < end)
    of_groups = _score_groups(queries, summary, batch, rows, is_candidate)
    pooled = pool_group(of_groups, is_candidate, "scaled", scale)
    if half != Half.BOTH:
        pooled += HELD_BONUS * _has_page(front_windows(rows, batch, windows), pooled.shape[1])
    budget = batch.budget_pages.flatten()[rows, None]
    num_wanted = groups_of(candidates * (budget - sink_pages - recent_pages))
    num_fitting = (num_columns - num_pages + GROUP_PAGES * (end - begin)) // GROUP_PAGES
    num_best = torch.minimum(num_wanted, num_fitting)

    # The groups between, ascending; then how many of them a row has says what lies in each column.
    best = pooled.topk(min(len(group), num_columns // GROUP_PAGES), -1).indices  # best first
    best = best.masked_fill(column[: best.shape[1]] >= num_best, len(group)).sort(1).values
    rank, member = column // GROUP_PAGES - begin, column % GROUP_PAGES
    between = GROUP_PAGES * best[:, rank.clamp(0, best.shape[1] - 1)] + member
    latest = GROUP_PAGES * (end + rank - num_best) + member
    latest = latest.masked_fill(latest >= num_pages, -1)
    listed = torch.where(rank < num_best, between, latest)
    pages[rows] = torch.where(rank < 0, column, listed).int()


def _has_page(window: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Which groups have a page of a window, int32 ``[n, width]``: bool, ``[n, num_groups]``."""
    group = torch.where(window >= 0, window.long() // GROUP_PAGES, num_groups).clamp_(max=num_groups)
    has_page = torch.zeros(len(window), num_groups + 1, dtype=torch.bool, device=window.device)
    return has_page.scatter_(1, group, True)[:, :num_groups]


def _score_groups(
    queries: torch.Tensor, summary: torch.Tensor, batch: Batch, rows: torch.Tensor, is_candidate: torch.Tensor
) -> torch.Tensor:
    """Scores of groups, not yet scaled: float32, ``[n, group_size, num_groups]``, undefined where no candidate is."""
    num_kv_heads, head_dim = summary.shape[1], summary.shape[3]
    request, head = rows // num_kv_heads, rows % num_kv_heads
    q = queries[batch.rows[request], head].float()
    q = q / 2, WIDTH_SHARE * q.abs() / 2
    q = torch.cat((q[0] - q[1], q[0] + q[1]), -1)  # the halves meet lo and hi
    last_pages = batch.page_table[request, GROUP_PAGES - 1 :: GROUP_PAGES][:, : is_candidate.shape[1]]
    row, group = is_candidate.nonzero(as_tuple=True)
    record = (last_pages * num_kv_heads + head[:, None])[is_candidate]
    scores = q.new_empty((len(rows), queries.shape[2], is_candidate.shape[1]))
    for users in group_equal(record):  # requests that share a page have it decoded once
        own = row[users]
        bounds = decode_fp8(summary.flatten(0, 1).index_select(0, record[users[:, 0]])).view(-1, 2 * head_dim, 1)
        of_users = q.index_select(0, own.flatten()).view(len(users), -1, 2 * head_dim)
        scores[own, :, group[users]] = (of_users @ bounds).view(*own.shape, -1)
    return scores
