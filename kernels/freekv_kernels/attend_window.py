"""Decode attention over the blocks of a window."""

from __future__ import annotations

import torch


def attend_window(
    q: torch.Tensor, block_kv: torch.Tensor, kv_indices: torch.Tensor, kv_lens: list[int], scale: float
) -> torch.Tensor:
    """Attend to the tokens of the blocks that a window lists.

    out[b, h, g] = softmax(scale * q[b, h, g] . K) V,  K, V = the first kv_lens[b] tokens of the blocks kv_indices[b, h]

    Each (request, KV head) is one row with its own list of blocks and the query group as its heads: FlashInfer's paged
    decode with ``num_kv_heads = 1``.

    Parameters
    ----------
    q : model dtype, ``[batch_size, num_kv_heads, group_size, head_dim]``, device
    block_kv : model dtype, ``[num_blocks, 2, page_size, head_dim]``, device
    kv_indices : int64, ``[batch_size, num_kv_heads, max_blocks]``, device
        Blocks in window order; entries past a row's ``ceil(kv_lens / page_size)`` are not read.
    kv_lens : list of int, ``[batch_size]``
        Tokens attended to per request; only the last block may be partial.
    scale : float

    Returns
    -------
    model dtype, ``[batch_size, num_kv_heads, group_size, head_dim]``
    """
    _, num_kv_heads, _, head_dim = q.shape
    page_size = block_kv.shape[2]
    halves = block_kv.view(-1, page_size * head_dim)  # rows: K of block 0, V of block 0, K of block 1, ...
    out = torch.empty_like(q)
    for row, kv_len in enumerate(kv_lens):
        num_blocks = (kv_len + page_size - 1) // page_size
        key_rows = kv_indices[row, :, :num_blocks].reshape(-1) * 2
        shape = (1, num_kv_heads, num_blocks * page_size, head_dim)
        k = halves.index_select(0, key_rows).view(shape)[:, :, :kv_len]
        v = halves.index_select(0, key_rows + 1).view(shape)[:, :, :kv_len]
        out[row] = torch.nn.functional.scaled_dot_product_attention(q[row : row + 1], k, v, scale=scale)[0]
    return out
