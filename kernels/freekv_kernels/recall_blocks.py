"""Recall (page, head) pairs from the host store into device blocks."""

from __future__ import annotations

import torch


def recall_blocks(
    host_kv: torch.Tensor, layer: int, keys: torch.Tensor, blocks: torch.Tensor, block_kv: torch.Tensor
) -> None:
    """Copy the K and V of (page, head) pairs from the host store to device blocks.

    block_kv[blocks[i]] = host_kv[keys[i] // num_kv_heads, layer, keys[i] % num_kv_heads]

    Parameters
    ----------
    host_kv : model dtype, ``[num_pages, num_layers, num_kv_heads, 2, page_size, head_dim]``, CPU, contiguous
        The whole host store.
    layer : int
    keys : int64, ``[num_keys]``
        page * num_kv_heads + head.
    blocks : int64, ``[num_keys]``, all different
    block_kv : model dtype, ``[num_blocks, 2, page_size, head_dim]``, device

    Notes
    -----
    Each copy is one contiguous run of ``2 * page_size * head_dim`` elements on both sides: 16 KiB at page 32,
    head_dim 128, bf16. That is what the head-major layout is for.
    """
    _, num_layers, num_kv_heads, *run = host_kv.shape
    pages, heads = keys // num_kv_heads, keys % num_kv_heads
    records = (pages * num_layers + layer) * num_kv_heads + heads
    block_kv[blocks] = host_kv.view(-1, *run).index_select(0, records)
