"""Correct windows: select again, at once, where one would lose too much of the attention; then for the next step."""

from __future__ import annotations

import torch

from freekv_kernels.score_pages import list_rows, listed_rows
from freekv_kernels.select_pages import Candidates, front_windows, select_pages, write_windows
from freekv_kernels.share_pages import share_pages
from freekv_kernels.tables import Batch, Count, FlagList, Half, PageStore

CALM = 0.5  # of the gate: a row whose window lacks no more than this is scored less often


def correct_windows(
    scores: torch.Tensor,
    queries: torch.Tensor,
    store: PageStore,
    batch: Batch,
    front_budget_pages: torch.Tensor,
    scale: float,
    gate: float,
    sink_pages: int,
    recent_pages: int,
    windows: torch.Tensor,
    flags: FlagList,
    counters: torch.Tensor,
    hysteresis: float = 0.0,
    pages: torch.Tensor | None = None,
    due: FlagList | None = None,
    pace: torch.Tensor | None = None,
    max_interval: int = 1,
) -> None:
    """Judge the front windows by what this step's queries ask for, correct them, and select the back windows.

    1. `share_pages` for BACK.
    2. With S the pages that `select_pages` would select by the shares for FRONT, and W those that the window has:
         is_flagged = sum of exp(shares) over S - the same sum over W > gate,  in rows over their budget
       A flagged row's front window becomes sink, S, recent.
    3. `select_pages` for BACK by the shares, pooling "mean".

    With `due`, all that is for these rows alone. The others' back windows are their front windows, none is flagged, and
    a due row that is now scored has
      pace[row, h, 0] = min(2 * pace[row, h, 0], max_interval) where it was judged, and what 2. compares with the gate
                        is at most CALM of it; else 1
      pace[row, h, 1] = pace[row, h, 0] - 1

    Parameters
    ----------
    scores, queries, store, scale
        See `share_pages`; the scores of the first head become the shares.
    batch : Batch
        With the budgets of the next step.
    front_budget_pages : int64, ``[batch_size, num_kv_heads]``, device
        Budgets that the front windows were selected with. Only rows that are over the other, too, are judged.
    gate : float
        Share of the attention that a window may lose.
    sink_pages, recent_pages, windows, hysteresis, pages
        See `select_pages`. A page of the window that is not listed has no share.
    flags : FlagList
        Written; `count` must be 0 before.
    counters : int64, ``[len(Count)]``, device
        FLAGGED_ROWS is advanced.
    due : FlagList, optional
        Of `append_tokens`: rows that `scores` has; by default it has all that are over their next budget.
    pace : int32, ``[max_requests + 1, num_kv_heads, 2]``, device, with `due`
        Written in due rows.
    max_interval : int, steps

    Notes
    -----
    A cosine (FreeKV, arXiv 2505.13109) says that a query has moved, and not that the window is wrong. That a row which
    lacked little will lack little for some steps is what we measured; LServe (MLSys 2025) selects every fourth step.
    """
    share_pages(scores, queries, store, batch, Half.BACK, scale, due, pages)
    shares, front = scores[:, :1], batch._replace(budget_pages=front_budget_pages)
    judged = listed_rows(front, Half.FRONT, None)
    judged = judged[torch.isin(judged, listed_rows(batch, Half.BACK, due))]
    rule = (sink_pages, recent_pages, windows, hysteresis, pages)
    lost = _correct(shares, judged, front, gate, *rule)
    is_flagged = torch.zeros_like(flags.is_flagged)
    is_flagged[judged] = lost > gate
    list_rows(is_flagged, flags)
    counters[Count.FLAGGED_ROWS] += is_flagged.sum()
    select_pages(shares, batch, Half.BACK, sink_pages, recent_pages, "mean", windows, due, 1.0, hysteresis, pages)
    if due is not None:
        over = listed_rows(batch, Half.BACK, None)
        kept = over[~due.is_flagged[over]]
        write_windows(front_windows(kept, batch, windows), kept, batch, Half.BACK, windows)
        _pace(due, batch, judged[lost <= CALM * gate], pace, max_interval)


def _pace(due: FlagList, batch: Batch, calm: torch.Tensor, pace: torch.Tensor, max_interval: int) -> None:
    """Say when due rows are scored next: rows that are `calm` after twice the steps."""
    rows = listed_rows(batch, Half.BACK, due)
    request, head = batch.rows[rows // pace.shape[1]], rows % pace.shape[1]
    twice = (2 * pace[request, head, 0]).clamp(max=max_interval)
    interval = torch.where(torch.isin(rows, calm), twice, 1)
    pace[request, head] = torch.stack((interval, interval - 1), -1).int()


def _correct(
    shares: torch.Tensor,
    rows: torch.Tensor,
    front: Batch,
    gate: float,
    sink_pages: int,
    recent_pages: int,
    windows: torch.Tensor,
    hysteresis: float,
    pages: torch.Tensor | None,
) -> torch.Tensor:
    """Correct the front windows of rows that lose more than the gate; what each of `rows` loses, float32 ``[n]``."""
    width = windows.shape[3]
    if len(rows) == 0:
        return shares.new_empty(0)
    candidates = Candidates.of(shares, rows, front, Half.FRONT, sink_pages, recent_pages, pages)
    own = candidates.scores[:, 0].masked_fill(~candidates.is_candidate, float("-inf"))
    is_held = candidates.are_in(front_windows(rows, front, windows))
    best, is_taken = candidates.best(own + hysteresis * is_held, width)
    shares_of_best = own.exp().gather(1, best).masked_fill(~is_taken, 0.0)
    lost = shares_of_best.sum(1) - own.exp().masked_fill(~is_held, 0.0).sum(1)

    is_flagged = lost > gate
    selected = candidates.window((best, is_taken), width)[is_flagged]
    write_windows(selected, rows[is_flagged], front, Half.FRONT, windows)
    return lost
