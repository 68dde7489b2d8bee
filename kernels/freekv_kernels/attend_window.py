"""Decode attention over the blocks that a page list names."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

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
        Every row has at least one block.
    kv_indices : int32, ``[>= kv_indptr[-1]]``
        Blocks of each row in window order.
    last_page_len : int32, ``[num_rows]``
        Tokens in the last block of each row, at least one.
    num_kv_heads : int
        Rows of one request, which are attended to at once where they are equally long.
    scale : float

    Returns
    -------
    model dtype, ``[num_rows, group_size, head_dim]``
    """
    page_size, head_dim = block_kv.shape[2:]
    halves = block_kv.view(-1, page_size * head_dim)  # rows: K of block 0, V of block 0, K of block 1, ...
    bounds, last_lens = kv_indptr.tolist(), last_page_len.tolist()
    num_blocks = [end - start for start, end in pairwise(bounds)]
    runs = list(_equal_runs(num_blocks, last_lens, num_kv_heads))
    sizes = [num_rows * blocks for num_rows, blocks, _ in runs]
    key_rows = kv_indices[: bounds[-1]] * 2
    # One run after the other is laid out in the same place, which stays in the core's cache.
    place = halves.new_empty(2 * max(sizes), page_size * head_dim)
    out = []
    inputs = zip(q.split([run[0] for run in runs]), key_rows.split(sizes), (key_rows + 1).split(sizes), strict=True)
    for (num_rows, blocks, last_len), (queries, *rows) in zip(runs, inputs, strict=True):
        kv = torch.index_select(halves, 0, torch.cat(rows), out=place[: 2 * num_rows * blocks])
        kv_len = (blocks - 1) * page_size + last_len
        k, v = kv.view(2, 1, num_rows, -1, head_dim)[:, :, :, :kv_len]
        out.append(torch.nn.functional.scaled_dot_product_attention(queries[None], k, v, scale=scale)[0])
    return torch.cat(out)


def _equal_runs(num_blocks: list[int], last_lens: list[int], longest: int) -> Iterator[tuple[int, int, int]]:
    """Adjacent rows that read equally many tokens: those of a request, unless its heads' budgets differ.

    How many rows, blocks of each, and tokens in its last block.
    """
    lengths = list(zip(num_blocks, last_lens, strict=True))
    for first in range(0, len(lengths), longest):
        for length, run in groupby(lengths[first : first + longest]):
            yield len(list(run)), *length
