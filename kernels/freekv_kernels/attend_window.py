"""Decode attention over the blocks that a page list names."""

from __future__ import annotations

from itertools import pairwise

import torch


def attend_window(
    q: torch.Tensor,
    block_kv: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    last_page_len: torch.Tensor,
    num_kv_heads: int,
    scale: float,
) -> torch.Tensor:
    """Attend to the tokens of the blocks that each row lists.

    out[r, g] = softmax(scale * q[r, g] . K) V
    K, V = the tokens of blocks kv_indices[kv_indptr[r] : kv_indptr[r + 1]], the first last_page_len[r] of the last one

    Each (request, KV head) is one row with its own list of blocks and the query group as its heads: FlashInfer's paged
    decode with ``num_kv_heads = 1``.

    Parameters
    ----------
    q : model dtype, ``[num_rows, group_size, head_dim]``
    block_kv : model dtype, ``[num_blocks, 2, page_size, head_dim]``
    kv_indptr : int32, ``[num_rows + 1]``
        The rows of a request have equally many blocks, at least one.
    kv_indices : int32, ``[>= kv_indptr[-1]]``
        Blocks of each row in window order.
    last_page_len : int32, ``[num_rows]``
        Tokens in the last block of each row, at least one; the rows of a request have equally many.
    num_kv_heads : int
        Rows of one request.
    scale : float

    Returns
    -------
    model dtype, ``[num_rows, group_size, head_dim]``
    """
    page_size, head_dim = block_kv.shape[2:]
    halves = block_kv.view(-1, page_size * head_dim)  # rows: K of block 0, V of block 0, K of block 1, ...
    num_blocks = [end - start for start, end in pairwise(kv_indptr[::num_kv_heads].tolist())]
    key_rows = (kv_indices[: sum(num_blocks)] * 2).split(num_blocks)
    last_lens = last_page_len[::num_kv_heads].tolist()
    queries = q.view(-1, 1, num_kv_heads, *q.shape[1:])
    out = []
    for q_own, k_rows, last_len in zip(queries, key_rows, last_lens, strict=True):
        shape = (1, num_kv_heads, len(k_rows) // num_kv_heads * page_size, head_dim)
        kv_len = shape[2] - page_size + last_len
        k = halves.index_select(0, k_rows).view(shape)[:, :, :kv_len]
        v = halves.index_select(0, k_rows + 1).view(shape)[:, :, :kv_len]
        out.append(torch.nn.functional.scaled_dot_product_attention(q_own, k, v, scale=scale))
    return torch.cat(out).view(q.shape)
