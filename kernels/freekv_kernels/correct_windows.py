"""Correct windows: select again, at once, where the window would lose too much of the attention."""

from __future__ import annotations

import torch

from freekv_kernels.score_pages import listed_rows
from freekv_kernels.select_pages import Candidates, front_windows, write_windows
from freekv_kernels.tables import Batch, Count, FlagList, Half


def correct_windows(
    shares: torch.Tensor,
    batch: Batch,
    gate: float,
    sink_pages: int,
    recent_pages: int,
    windows: torch.Tensor,
    flags: FlagList,
    counters: torch.Tensor,
    hysteresis: float = 0.0,
    pages: torch.Tensor | None = None,
) -> None:
    """Flag the rows whose front window has too little of what this step's queries ask for, and select these again.

    With S the pages that `select_pages` would select by `shares` for FRONT, and W those that the window has selected:
      is_flagged = sum of exp(shares) over S - the same sum over W > gate,  in rows over their budget
    A flagged row's front window becomes sink, S, recent. Back windows are the workspace: `select_pages` writes them
    next.

    Parameters
    ----------
    shares : float32, ``[batch_size * num_kv_heads, 1, num_listed]``, device
        Of `share_pages`; not changed, but for rounding.
    batch : Batch
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
    width = windows.shape[3]
    rows = listed_rows(batch, Half.FRONT, None)
    flags.is_flagged.zero_()
    if len(rows) == 0:
        return
    candidates = Candidates.of(shares, rows, batch, Half.FRONT, sink_pages, recent_pages, pages)
    own = candidates.scores[:, 0].masked_fill(~candidates.is_candidate, float("-inf"))
    is_held = candidates.are_in(front_windows(rows, batch, windows))
    best, is_taken = candidates.best(own + hysteresis * is_held, width)
    shares_of_best = own.exp().gather(1, best).masked_fill(~is_taken, 0.0)
    lost = shares_of_best.sum(1) - own.exp().masked_fill(~is_held, 0.0).sum(1)

    is_flagged = lost > gate
    flagged = rows[is_flagged]
    write_windows(candidates.window((best, is_taken), width)[is_flagged], flagged, batch, Half.FRONT, windows)
    flags.is_flagged[flagged] = True
    flags.rows[: len(flagged)] = flagged.int()
    flags.count.fill_(len(flagged))
    counters[Count.FLAGGED_ROWS] += len(flagged)
