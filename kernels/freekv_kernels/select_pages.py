"""Select the pages of a window: sink, best scored, recent."""

from __future__ import annotations

import torch


def pool_group(scores: torch.Tensor, is_candidate: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool the scores of a query group, so that all heads of a KV head want the same pages.

    softmax: mean over the group of softmax over the candidates, in log space, where far pages do not tie at 0.
    mean: mean over the group of the raw scores.

    Parameters
    ----------
    scores : float32, ``[batch_size, num_kv_heads, group_size, max_pages]``
    is_candidate : bool, ``[batch_size, max_pages]``
    pooling : "softmax" | "mean"

    Returns
    -------
    float32, ``[batch_size, num_kv_heads, max_pages]``, -inf where a page is no candidate
    """
    scores = scores.masked_fill(~is_candidate[:, None, None], float("-inf"))
    if pooling == "softmax":
        return torch.log_softmax(scores, -1).logsumexp(2)
    if pooling == "mean":
        return scores.mean(2)
    raise ValueError(f"Invalid pooling: expected 'softmax' or 'mean', got {pooling!r}")


def select_pages(
    scores: torch.Tensor,
    num_pages: torch.Tensor,
    budget_pages: torch.Tensor,
    sink_pages: int,
    recent_pages: int,
    max_budget_pages: int,
    pooling: str,
) -> torch.Tensor:
    """Choose what each (request, KV head) attends to.

    num_pages <= budget: every page. Otherwise the first `sink_pages`, the last `recent_pages`, and between them the
    ``budget - sink - recent`` pages with the highest pooled score.

    Parameters
    ----------
    scores : float32, ``[batch_size, num_kv_heads, group_size, max_pages]``
        Of `score_pages`.
    num_pages : int64, ``[batch_size]``
        Pages of the request at the step that will read the window; may exceed max_pages by the page yet to be opened.
    budget_pages : int64, ``[batch_size]``
        Pages a request may attend to, sink and recent included.
    sink_pages, recent_pages, max_budget_pages : int
    pooling : "softmax" | "mean"

    Returns
    -------
    int32, ``[batch_size, num_kv_heads, max_budget_pages]``
        Logical pages, ascending, -1 padded; the last, partial page is the last valid entry.

    Notes
    -----
    Equal scores at the threshold may be taken in any order. Source: FreeKV (arXiv 2505.13109), group-consistent
    selection; the budget includes sink and recent pages, unlike in the authors' accuracy code.
    """
    batch_size, num_kv_heads, _, max_pages = scores.shape
    column = torch.arange(max_budget_pages, device=scores.device)
    num_pages, budget_pages = num_pages[:, None], budget_pages[:, None]
    # Within the budget: all pages.  [batch_size, max_budget_pages]
    everything = torch.where(column < num_pages, column, -1)[:, None].expand(-1, num_kv_heads, -1)
    is_over = num_pages > budget_pages
    width = min(max_budget_pages - sink_pages - recent_pages, max_pages)
    if width <= 0 or not is_over.any():
        return everything.int()

    page = torch.arange(max_pages, device=scores.device)
    is_candidate = (page >= sink_pages) & (page < num_pages - recent_pages) | ~is_over
    best = pool_group(scores, is_candidate, pooling).topk(width, -1).indices  # best first
    num_selected = budget_pages - sink_pages - recent_pages  # [batch_size, 1]
    past_the_end = max_pages + max_budget_pages
    best = best.masked_fill((column[:width] >= num_selected)[:, None], past_the_end).sort(-1).values

    window = torch.full((batch_size, num_kv_heads, max_budget_pages), -1, device=scores.device)
    window[..., :sink_pages] = column[:sink_pages]
    window[..., sink_pages : sink_pages + width] = best
    rank = column - (budget_pages - recent_pages)  # of a recent page; negative before them
    recent = torch.where(rank < recent_pages, num_pages - recent_pages + rank, -1)
    window = torch.where((rank >= 0)[:, None], recent[:, None], window)
    return torch.where(is_over[:, None], window, everything).int()
