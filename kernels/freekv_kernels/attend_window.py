"""Decode attention over the blocks that a page list names."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch

from freekv_kernels.logits import add_sinks, cap_logits


def attend_window(
    q: torch.Tensor,
    block_kv: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    last_page_len: torch.Tensor,
    num_kv_heads: int,
    scale: float,
    sliding_window: int | None = None,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the tokens of the blocks that each row lists.

    out[r, g] = softmax(scale * q[r, g] . K) V
    K, V = the tokens of blocks kv_indices[kv_indptr[r] : kv_indptr[r + 1]], the first last_page_len[r] of the last one;
    of these the last `sliding_window`

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
    sliding_window : int, optional
        Tokens that a row attends to at most, its latest ones. By default all.
    logit_cap : float
        Scaled logits become cap * tanh(logit / cap); 0: they stay.
    sinks : float32, ``[num_kv_heads, group_size]``, optional
        Logits without a value, one more in each softmax.

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
    out, head = [], 0
    inputs = zip(q.split([run[0] for run in runs]), key_rows.split(sizes), (key_rows + 1).split(sizes), strict=True)
    for (num_rows, blocks, last_len), (queries, *rows) in zip(runs, inputs, strict=True):
        kv = torch.index_select(halves, 0, torch.cat(rows), out=place[: 2 * num_rows * blocks])
        kv_len = (blocks - 1) * page_size + last_len
        first = 0 if sliding_window is None else max(kv_len - sliding_window, 0)
        k, v = kv.view(2, num_rows, -1, head_dim)[:, :, first:kv_len]
        if logit_cap or sinks is not None:
            own = None if sinks is None else sinks[head : head + num_rows]
            out.append(_attend(queries, k, v, scale, logit_cap, own))
        else:
            out.append(torch.nn.functional.scaled_dot_product_attention(queries, k, v, scale=scale))
        head = (head + num_rows) % num_kv_heads
    return torch.cat(out)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, logit_cap: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Of rows that are equally long, ``[num_rows, group_size or tokens, head_dim]``, in float32."""
    logits = cap_logits(scale * q.float() @ k.float().transpose(1, 2), logit_cap)
    out = logits.softmax(-1) @ v.float()
    if sinks is not None:
        out = add_sinks(out, logits.logsumexp(-1), sinks)
    return out.to(q.dtype)


def _equal_runs(num_blocks: list[int], last_lens: list[int], longest: int) -> Iterator[tuple[int, int, int]]:
    """Adjacent rows that read equally many tokens: those of a request, unless its heads' budgets differ.

    How many rows, blocks of each, and tokens in its last block.
    """
    lengths = list(zip(num_blocks, last_lens, strict=True))
    for first in range(0, len(lengths), longest):
        for length, run in groupby(lengths[first : first + longest]):
            yield len(list(run)), *length
