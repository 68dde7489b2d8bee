"""Share pages: what part of a row's attention each page has, by its estimated mass."""

from __future__ import annotations

import math

import torch

from freekv_kernels.records import records_at
from freekv_kernels.score_pages import listed_rows
from freekv_kernels.tables import Batch, FlagList, Half, PageStore


def share_pages(
    scores: torch.Tensor,
    queries: torch.Tensor,
    store: PageStore,
    batch: Batch,
    half: Half,
    scale: float,
    flags: FlagList | None = None,
    pages: torch.Tensor | None = None,
) -> None:
    """Turn the estimated masses of pages into shares of the attention, pooled over the query group.

    With m[g, c] the mass of the page of column c for query head g, and M[g] the sum over the columns:
      scores[row, 0, c] = log(mean over g of m[g, c] / M[g])
    Masses are exp(scores), but for the page of the latest token, whose mass is that of its keys themselves.

    Parameters
    ----------
    scores : float32, ``[batch_size * num_kv_heads, group_size, num_listed]``, device
        Of `score_pages` with a scale. Written in place, in the rows over their budget, or only in flagged rows if
        given: the first query head's become the shares, undefined where a column has no page; the other heads' are
        undefined.
    queries : model dtype, ``[max_requests + 1, num_kv_heads, group_size, head_dim]``, device
    store : PageStore
        The latest page's keys are read from its block, or where it has none from the host store.
    batch : Batch
        `slots` are those of the latest tokens.
    half : Half
    scale : float, of attention's logits
    flags : FlagList, optional
    pages : int32, ``[batch_size * num_kv_heads, num_listed]``, device, optional
        Page of each column, -1 for none; by default the number of the column. Pages that are not listed have no mass.

    Notes
    -----
    The latest page has no codes until it is full, and most of what a token attends to is near: its share is exact.
    """
    num_kv_heads, page_size = queries.shape[1], store.block_kv.shape[2]
    rows = listed_rows(batch, half, flags)
    if len(rows) == 0:
        return
    request, head = rows // num_kv_heads, rows % num_kv_heads
    last = batch.num_pages[request] - 1
    page = torch.arange(scores.shape[2], device=rows.device) if pages is None else pages[rows]
    masses = scores[rows]
    masses.masked_fill_(((page < 0) | (page >= last[:, None]))[:, None], float("-inf"))

    records = records_at(store.host_kv, batch.page_table[request, last], head)
    keys = store.codec.decode(records, store.block_kv.dtype)[:, 0].float()  # [n, page_size, head_dim]
    logits = scale * queries[batch.rows[request], head].float() @ keys.transpose(1, 2)
    is_later = torch.arange(page_size, device=rows.device) > batch.slots[request, None] % page_size
    of_last = logits.masked_fill_(is_later[:, None], float("-inf")).logsumexp(-1, keepdim=True)

    masses = torch.where((page == last[:, None])[:, None], of_last, masses)
    shares = masses - masses.logsumexp(-1, keepdim=True)
    scores[rows, 0] = shares.logsumexp(1) - math.log(scores.shape[1])
