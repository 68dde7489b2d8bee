"""Apportion pages: how many of them each KV head of a request gets, by what its attention asks for."""

from __future__ import annotations

import torch

from freekv_kernels.tables import Batch, Half


def apportion_pages(
    shares: torch.Tensor,
    batch: Batch,
    half: Half,
    masses: torch.Tensor,
    sink_pages: int,
    recent_pages: int,
    times: int,
    budget_pages: torch.Tensor,
    row_budgets: torch.Tensor,
    pages: torch.Tensor | None = None,
) -> None:
    """Set the budget of each row over its own by the estimated mass; together a request's rows get no more than before.

    A row wants the fewest pages that leave out at most ``1 - mass`` of its attention: sink, recent, and the candidates
    with the largest shares, at least one. Where the rows of a request want more than the sum of their budgets, the
    wanted candidates with the largest shares of all of these rows are kept: what is cut off has the least attention.

    Parameters
    ----------
    shares : float32, ``[batch_size * num_kv_heads, 1, num_listed]``, device
        Of `share_pages`; not changed.
    batch : Batch
        Its budgets bound the sums. Rows within them keep them: they read everything.
    half : Half
        Which length counts.
    masses : float32, ``[max_requests + 1]``, device
        By row of the request table, 0 to 1; with 0 a request's budgets stay as they are.
    sink_pages, recent_pages : int
        Their sum is at most any budget; a row whose budget it is gets nothing else.
    times : int
        Most pages that a row selects, for each that its own budget has room for.
    budget_pages : int64, ``[batch_size, num_kv_heads]``, device
        Written, of every row: less than the pages of a request in rows over their budgets, so they stay over them.
    row_budgets : int64, ``[max_requests + 1, num_kv_heads]``, device
        Written: the same, by row of the request table.
    pages : int32, ``[batch_size * num_kv_heads, num_listed]``, device, optional
        See `select_pages`; a row gets no more than are listed.

    Notes
    -----
    The need is mostly a property of the head: at equal mean size, windows of unequal size lose less (Twilight,
    arXiv 2502.02770, chooses sizes so, without a bound for their sum). Equal shares where the sum ends may be kept in
    any order.
    """
    fixed, num_columns = sink_pages + recent_pages, shares.shape[2]
    num_pages, mass = batch.num_pages_at(half)[:, None], masses[batch.rows, None]
    is_open = (num_pages > batch.budget_pages) & (mass > 0)  # [batch_size, num_kv_heads]
    shares = shares.view(*is_open.shape, num_columns)
    column = torch.arange(num_columns, device=shares.device)
    page = column if pages is None else pages.view(shares.shape)
    is_candidate = (page >= sink_pages) & (page < (num_pages - recent_pages)[..., None]) & is_open[..., None]
    best = shares.masked_fill(~is_candidate, float("-inf")).sort(-1, descending=True).values

    reached = best.exp().cumsum(-1)
    num_wanted = 1 + (reached < reached[..., -1:] - (1 - mass[..., None])).sum(-1)
    room = torch.where(is_open, batch.budget_pages - fixed, 0)
    most = torch.minimum(num_pages - fixed - 1, is_candidate.sum(-1)).minimum(times * room)
    num_wanted = torch.minimum(num_wanted, most)
    rank = best.masked_fill(column >= num_wanted[..., None], float("-inf"))
    rank = rank.masked_fill(column < room.clamp(max=1)[..., None], float("inf")).flatten(1)
    order = rank.argsort(descending=True)
    is_kept = torch.zeros_like(rank, dtype=torch.bool)
    is_kept.scatter_(1, order, column.new_ones(rank.shape).cumsum(1) <= room.sum(1, keepdim=True))
    num_kept = (is_kept & (rank > float("-inf"))).view(shares.shape).sum(-1)
    budget_pages.copy_(torch.where(is_open, fixed + num_kept, batch.budget_pages))
    row_budgets[batch.rows] = budget_pages
