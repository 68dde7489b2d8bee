"""Select the pages of a window: sink, best scored, recent."""

from __future__ import annotations

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
) -> None:
    """Choose what each (request, KV head) attends to.

    Over the budget: the first `sink_pages`, the last `recent_pages`, and between them the ``budget - sink - recent``
    pages with the highest pooled score. Within it: every page; only a first window needs that to be written.

    Parameters
    ----------
    scores : float32, ``[batch_size * num_kv_heads, group_size, max_pages]``, device
        Of `score_pages`. The scores of selected rows may be overwritten: they are the workspace.
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

    Notes
    -----
    Equal scores at the threshold may be taken in any order. Source: FreeKV (arXiv 2505.13109), group-consistent
    selection; the budget includes sink and recent pages, unlike in the authors' accuracy code.
    """
    num_kv_heads, width = windows.shape[2:]
    rows = listed_rows(batch, half, flags)
    column = torch.arange(width, device=windows.device)
    if half == Half.BOTH:
        every_page = torch.where(column < batch.num_pages_next[:, None], column, -1).int()
        windows[:, batch.rows] = every_page[:, None].expand(-1, num_kv_heads, -1)
    if len(rows) == 0:
        return
    request, head = rows // num_kv_heads, rows % num_kv_heads
    num_pages, budget = batch.num_pages_at(half)[request, None], batch.budget_pages[request, head, None]

    if flags is not None or len(rows) < len(scores):
        scores = scores[rows]
    max_pages = scores.shape[-1]
    page = torch.arange(max_pages, device=scores.device)
    is_candidate = (page >= sink_pages) & (page < num_pages - recent_pages)
    num_best = min(width - sink_pages - recent_pages, max_pages)
    pooled = pool_group(scores, is_candidate, pooling, scale)
    if hysteresis and half != Half.BOTH:
        (front,) = Half.FRONT.indices(int(batch.step))
        _favour(pooled, windows[front, batch.rows[request], head], hysteresis)
    best = pooled.topk(num_best, -1).indices  # best first
    past_the_end = max_pages + width
    is_taken = column[:num_best] < budget - sink_pages - recent_pages
    best = best.masked_fill(~is_taken, past_the_end).sort(-1).values

    window = torch.full((len(rows), width), -1, device=scores.device)
    window[:, :sink_pages] = column[:sink_pages]
    window[:, sink_pages : sink_pages + num_best] = best
    rank = column - (budget - recent_pages)  # of a recent page; negative before them
    recent = torch.where(rank < recent_pages, num_pages - recent_pages + rank, -1)
    window = torch.where(rank >= 0, recent, window).int()
    for index in half.indices(int(batch.step)):
        windows[index, batch.rows[request], head] = window


def _favour(pooled: torch.Tensor, window: torch.Tensor, bonus: float) -> None:
    """Add `bonus` to the pages of a window: ``[num_rows, max_pages]`` and ``[num_rows, width]``, -1 padded."""
    num_rows, max_pages = pooled.shape
    is_in = torch.zeros(num_rows, max_pages + 1, dtype=torch.bool, device=pooled.device)
    is_in.scatter_(1, torch.where(window >= 0, window.long(), max_pages), True)
    pooled += bonus * is_in[:, :max_pages]
