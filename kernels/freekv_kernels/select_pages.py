"""Select the pages of a window: sink, best scored, recent."""

from __future__ import annotations

from typing import NamedTuple

import torch

from freekv_kernels.score_pages import listed_rows
from freekv_kernels.tables import Batch, FlagList, Half

POOLINGS = ("softmax", "scaled", "max", "mean")


def pool_group(scores: torch.Tensor, is_candidate: torch.Tensor, pooling: str, scale: float = 1.0) -> torch.Tensor:
    """Pool the scores of a query group, so that all heads of a KV head want the same pages.

    softmax: mean over the group of softmax over the candidates, of scores without a scale, as in the paper's code.
    scaled: the same of scores times `scale`, as attention weighs tokens; without it each head's best page has it all.
    max: maximum over the group of those softmaxes.
    mean: mean over the group of the raw scores.

    Softmaxes are compared by their logarithms, where far pages do not tie at 0.

    Parameters
    ----------
    scores : float32, ``[num_rows, group_size, max_pages]``
    is_candidate : bool, ``[num_rows, max_pages]``
    pooling : one of `POOLINGS`
    scale : float
        Of attention's logits.

    Returns
    -------
    float32, ``[num_rows, max_pages]``, -inf where a page is no candidate
    """
    check_pooling(pooling)
    scores = scores.masked_fill(~is_candidate[:, None], float("-inf"))
    if pooling == "mean":
        return scores.mean(1)
    shares = torch.log_softmax(scores if pooling == "softmax" else scale * scores, -1)
    return shares.amax(1) if pooling == "max" else shares.logsumexp(1)


def check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"Invalid pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")


def select_pages(
    scores: torch.Tensor,
    batch: Batch,
    half: Half,
    sink_pages: int,
    recent_pages: int,
    pooling: str,
    windows: torch.Tensor,
    flags: FlagList | None = None,
    scale: float = 1.0,
    hysteresis: float = 0.0,
    pages: torch.Tensor | None = None,
) -> None:
    """Choose what each (request, KV head) attends to.

    Over the budget: the first `sink_pages`, the last `recent_pages`, and between them the ``budget - sink - recent``
    pages with the highest pooled score. Within it: every page; only a first window needs that to be written.

    Parameters
    ----------
    scores : float32, ``[batch_size * num_kv_heads, group_size, num_listed]``, device
        Of `score_pages`. The scores of selected rows may be overwritten, as they are the workspace; those of one head,
        which are pooled already as `share_pages` does it, change by rounding at most.
    batch : Batch
        ``num_pages_at(half)`` may exceed the pages that exist by the one yet to be opened, which is recent.
    half : Half
        FRONT and BACK write the windows of rows over their budget; BOTH both windows of every row.
    sink_pages, recent_pages : int
        recent_pages is at least 1; their sum is at most any budget, and where it is the budget nothing is selected.
    pooling : "softmax" | "scaled" | "max" | "mean"
        See `pool_group`.
    windows : int32, ``[2, max_requests + 1, num_kv_heads, max_budget_pages]``, device
        Written, by row of the request table: logical pages, ascending, -1 padded; the last, partial page is the last
        valid entry. The front is ``windows[step % 2]``.
    flags : FlagList, optional
        Only these rows; by default every row.
    scale : float
        Of attention's logits, for the poolings "scaled" and "max".
    hysteresis : float, >= 0
        Added to the pooled scores of the pages that the front window has selected, before it is written; not with BOTH,
        as there is none. Poolings of softmaxes give logarithms, so it is in nats.
    pages : int32, ``[batch_size * num_kv_heads, num_listed]``, device, optional
        Page of each column, ascending, -1 for none; by default the number of the column. The sink pages are listed, and
        at least as many others as are selected.

    Notes
    -----
    Equal scores at the threshold may be taken in any order. Source: FreeKV (arXiv 2505.13109), group-consistent
    selection; the budget includes sink and recent pages, unlike in the authors' accuracy code.
    """
    rows = listed_rows(batch, half, flags)
    if half == Half.BOTH:
        column = torch.arange(windows.shape[3], device=windows.device)
        every_page = torch.where(column < batch.num_pages_next[:, None], column, -1).int()
        windows[:, batch.rows] = every_page[:, None].expand(-1, windows.shape[2], -1)
    if len(rows) == 0:
        return
    candidates = Candidates.of(scores, rows, batch, half, sink_pages, recent_pages, pages)
    pooled = pool_group(candidates.scores, candidates.is_candidate, pooling, scale)
    if hysteresis and half != Half.BOTH:
        pooled = pooled + hysteresis * candidates.are_in(front_windows(rows, batch, windows))
    best = candidates.best(pooled, windows.shape[3])
    write_windows(candidates.window(best, windows.shape[3]), rows, batch, half, windows)


class Candidates(NamedTuple):
    """The pages among which rows choose; n rows of C columns."""

    scores: torch.Tensor  # float32 [n, group_size, C]
    pages: torch.Tensor  # int64 [n, C], of the columns; -1: none
    is_candidate: torch.Tensor  # bool [n, C], neither sink nor recent
    num_pages: torch.Tensor  # int64 [n, 1]
    budget: torch.Tensor  # int64 [n, 1], pages
    sink: int  # pages
    recent: int  # pages

    @classmethod
    def of(
        cls,
        scores: torch.Tensor,
        rows: torch.Tensor,
        batch: Batch,
        half: Half,
        sink: int,
        recent: int,
        pages: torch.Tensor | None,
    ) -> Candidates:
        num_kv_heads = batch.budget_pages.shape[1]
        num_pages = batch.num_pages_at(half)[rows // num_kv_heads, None]
        scores = scores[rows]
        every_page = torch.arange(scores.shape[2], device=scores.device).expand(len(rows), -1)
        pages = every_page if pages is None else pages[rows].long()
        is_candidate = (pages >= sink) & (pages < num_pages - recent)
        return cls(scores, pages, is_candidate, num_pages, batch.budget_pages.flatten()[rows, None], sink, recent)

    def are_in(self, window: torch.Tensor) -> torch.Tensor:
        """Which of the columns' pages a window has, int ``[n, width]``, -1 padded: bool ``[n, C]``."""
        is_in = torch.zeros(len(window), int(self.num_pages.max()) + 1, dtype=torch.bool, device=window.device)
        is_in.scatter_(1, window.long() % is_in.shape[1], True)  # -1 falls on the last, which is no page
        return is_in.gather(1, self.pages % is_in.shape[1])

    def best(self, pooled: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of the pages that score highest, best first, and which of them the budget has room for."""
        num_best = min(width - self.sink - self.recent, pooled.shape[1])
        is_taken = torch.arange(num_best, device=pooled.device) < self.budget - self.sink - self.recent
        return pooled.topk(num_best, -1).indices, is_taken

    def window(self, best: tuple[torch.Tensor, torch.Tensor], width: int) -> torch.Tensor:
        """Sink, best, recent: int32 ``[n, width]``."""
        columns, is_taken = best
        past_the_end = torch.iinfo(torch.int32).max
        selected = self.pages.gather(1, columns).masked_fill(~is_taken, past_the_end).sort(-1).values
        column = torch.arange(width, device=selected.device)
        window = torch.full((len(selected), width), -1, device=selected.device)
        window[:, : self.sink] = column[: self.sink]
        window[:, self.sink : self.sink + selected.shape[1]] = selected
        rank = column - (self.budget - self.recent)  # of a recent page; negative before them
        recent = torch.where(rank < self.recent, self.num_pages - self.recent + rank, -1)
        return torch.where(rank >= 0, recent, window).int()


def front_windows(rows: torch.Tensor, batch: Batch, windows: torch.Tensor) -> torch.Tensor:
    """The front windows of rows: int32 ``[n, width]``."""
    (front,) = Half.FRONT.indices(int(batch.step))
    num_kv_heads = windows.shape[2]
    return windows[front, batch.rows[rows // num_kv_heads], rows % num_kv_heads]


def write_windows(window: torch.Tensor, rows: torch.Tensor, batch: Batch, half: Half, windows: torch.Tensor) -> None:
    num_kv_heads = windows.shape[2]
    for index in half.indices(int(batch.step)):
        windows[index, batch.rows[rows // num_kv_heads], rows % num_kv_heads] = window
