"""Lay pages of the host store out as tokens, for prefill attention."""

from __future__ import annotations

import torch


def fill_arena(
    arena: torch.Tensor, host_kv: torch.Tensor, pages: torch.Tensor, block_kv: torch.Tensor, table: torch.Tensor
) -> None:
    """Convert pages from head-major to NHD, in the order given.

    arena[i * page_size + offset, 0 | 1, h] = host_kv[pages[i], h, 0 | 1, offset]

    Parameters
    ----------
    arena : model dtype, ``[>= num_pages * page_size, 2, num_kv_heads, head_dim]``, device
        One half of the prefill arena; tokens past the pages are left alone.
    host_kv : model dtype, ``[num_host_pages, num_kv_heads, 2, page_size, head_dim]``, CPU (pinned)
        One layer of the host store (a strided view).
    pages : int64, ``[num_pages]``, device
    block_kv : model dtype, ``[num_blocks, 2, page_size, head_dim]``, device
    table : int32, ``[num_host_pages, num_kv_heads]``, device
        A resident block equals its host page in the written tokens, so it may be read instead: it is nearer.
    """
    tokens = host_kv[pages].permute(0, 3, 2, 1, 4).flatten(0, 1)
    arena[: len(tokens)] = tokens
