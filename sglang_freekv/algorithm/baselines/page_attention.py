"""What attention gives to pages, by their exact keys: what methods that evict compute as they attend.

Read from the host store, which on a CPU is memory like any other.
"""

from __future__ import annotations

import torch

from freekv_kernels import Batch, window_pairs
from freekv_kernels.records import records_at
from sglang_freekv.memory.layers import Layer


def last_positions(batch: Batch, page_size: int) -> torch.Tensor:
    """Position of each request's latest token: int64 ``[batch_size]``."""
    return (batch.num_pages - 1) * page_size + batch.slots % page_size


def page_keys(layer: Layer, batch: Batch, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of logical pages.

    Parameters
    ----------
    pages : int64, ``[batch_size, num_kv_heads, width]``
        -1, or past the request: no page.

    Returns
    -------
    keys : float32, ``[batch_size, num_kv_heads, width, page_size, head_dim]``, 0 where nothing is written
    positions : int64, ``[batch_size, num_kv_heads, width, page_size]``, of the tokens; past any where there is none
    """
    store, num_kv_heads, page_size = layer.store, pages.shape[1], layer.store.block_kv.shape[2]
    pairs, is_page = window_pairs(pages.clone(), batch.page_table, batch.num_pages)
    records = records_at(store.host_kv, (pairs // num_kv_heads).flatten(), (pairs % num_kv_heads).flatten())
    keys = store.codec.decode(records, store.block_kv.dtype)[:, 0].unflatten(0, pairs.shape).float()
    positions = pages[..., None] * page_size + torch.arange(page_size)
    is_token = is_page[..., None] & (positions <= last_positions(batch, page_size)[:, None, None, None])
    never = torch.iinfo(positions.dtype).max
    return keys.masked_fill(~is_token[..., None], 0), positions.masked_fill(~is_token, never)


def page_shares(layer: Layer, batch: Batch, pages: torch.Tensor, queries: torch.Tensor, scale: float) -> torch.Tensor:
    """Share of each page in the attention of the latest queries to these pages, in logarithms.

    Parameters
    ----------
    pages : int64, ``[batch_size, num_kv_heads, width]``
        See `page_keys`.
    queries : model dtype, ``[batch_size, n, num_kv_heads, group_size, head_dim]``
        Of the latest tokens, the last one first; each attends to the tokens up to its own.
    scale : float, of the logits

    Returns
    -------
    float32, ``[batch_size, num_kv_heads, n, group_size, width]``, -inf where there is no page
    """
    keys, positions = page_keys(layer, batch, pages)
    logits = scale * torch.einsum("bnhgd,bhwsd->bhngws", queries.float(), keys)
    last = last_positions(batch, keys.shape[-2])[:, None] - torch.arange(queries.shape[1])  # of each query
    is_later = positions[:, :, None] > last[:, None, :, None, None]
    masses = logits.masked_fill_(is_later[:, :, :, None], float("-inf")).logsumexp(-1)
    return masses - masses.logsumexp(-1, keepdim=True)
