"""Correct windows: select again, at once, where one would lose too much of the attention; then for the next step."""

from __future__ import annotations

import torch

from freekv_kernels.score_pages import listed_rows
from freekv_kernels.select_pages import Candidates, front_windows, select_pages, write_windows
from freekv_kernels.share_pages import share_pages
from freekv_kernels.tables import Batch, Count, FlagList, Half, PageStore


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
) -> None:
    """Judge the front windows by what this step's queries ask for, correct them, and select the back windows.

    1. `share_pages` for BACK.
    2. With S the pages that `select_pages` would select by the shares for FRONT, and W those that the window has:
         is_flagged = sum of exp(shares) over S - the same sum over W > gate,  in rows over their budget
       A flagged row's front window becomes sink, S, recent.
    3. `select_pages` for BACK by the shares, pooling "mean".

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

    Notes
    -----
    A cosine (FreeKV, arXiv 2505.13109) says that a query has moved, and not that the window is wrong.
    """
    share_pages(scores, queries, store, batch, Half.BACK, scale, None, pages)
    shares = scores[:, :1]
    flagged = _correct(shares, batch, front_budget_pages, gate, sink_pages, recent_pages, windows, hysteresis, pages)
    flags.is_flagged.zero_()
    flags.is_flagged[flagged] = True
    flags.rows[: len(flagged)] = flagged.int()
    flags.count.fill_(len(flagged))
    counters[Count.FLAGGED_ROWS] += len(flagged)
    rule = (sink_pages, recent_pages, "mean", windows, None, 1.0, hysteresis, pages)
    select_pages(shares, batch, Half.BACK, *rule)


def _correct(
    shares: torch.Tensor,
    batch: Batch,
    front_budget_pages: torch.Tensor,
    gate: float,
    sink_pages: int,
    recent_pages: int,
    windows: torch.Tensor,
    hysteresis: float,
    pages: torch.Tensor | None,
) -> torch.Tensor:
    """Correct front windows; the rows (int64) that were."""
    width, front = windows.shape[3], batch._replace(budget_pages=front_budget_pages)
    rows = listed_rows(front, Half.FRONT, None)
    rows = rows[torch.isin(rows, listed_rows(batch, Half.BACK, None))]
    if len(rows) == 0:
        return rows
    candidates = Candidates.of(shares, rows, front, Half.FRONT, sink_pages, recent_pages, pages)
    own = candidates.scores[:, 0].masked_fill(~candidates.is_candidate, float("-inf"))
    is_held = candidates.are_in(front_windows(rows, front, windows))
    best, is_taken = candidates.best(own + hysteresis * is_held, width)
    shares_of_best = own.exp().gather(1, best).masked_fill(~is_taken, 0.0)
    lost = shares_of_best.sum(1) - own.exp().masked_fill(~is_held, 0.0).sum(1)

    is_flagged = lost > gate
    flagged = rows[is_flagged]
    write_windows(candidates.window((best, is_taken), width)[is_flagged], flagged, front, Half.FRONT, windows)
    return flagged
