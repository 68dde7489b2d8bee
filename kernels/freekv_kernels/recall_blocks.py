"""Recall (page, head) pairs from the host store into the blocks that were claimed for them."""

from __future__ import annotations

import torch

from freekv_kernels.tables import Count, MissList


def recall_blocks(
    host_kv: torch.Tensor,
    layer: int,
    misses: MissList,
    block_kv: torch.Tensor,
    table: torch.Tensor,
    counters: torch.Tensor,
    kv_indices: torch.Tensor | None = None,
) -> None:
    """Copy the K and V of missing pairs from the host store, once per pair, and complete the window.

    block_kv[misses.blocks[i]] = host_kv[page, layer, head],  page, head = divmod(misses.keys[i], num_kv_heads)
    kv_indices[misses.entries[i]] = table[page, head], 0 if it has no block

    Parameters
    ----------
    host_kv : model dtype, ``[num_pages, num_layers, num_kv_heads, 2, page_size, head_dim]``, CPU (pinned), contiguous
        The whole host store.
    layer : int
    misses : MissList
        After `claim_blocks`; nothing is copied where `blocks` is -1.
    block_kv : model dtype, ``[num_blocks, 2, page_size, head_dim]``, device
    table : int32, ``[num_pages, num_kv_heads]``, device
    counters : int64, ``[len(Count)]``, device
        RECALLS is advanced by the copies; with kv_indices, ABSENT_PAGES by the entries that have no block.
    kv_indices : int32, device, optional
        Of the front windows.

    Notes
    -----
    Each copy is one contiguous run of ``2 * page_size * head_dim`` elements on both sides: 16 KiB at page 32,
    head_dim 128, bf16. That is what the head-major layout is for.
    """
    count = int(misses.count)
    if count == 0:
        return
    _, num_layers, num_kv_heads, *run = host_kv.shape
    keys, blocks = misses.keys[:count], misses.blocks[:count].long()
    copied = blocks >= 0
    pages, heads = keys[copied] // num_kv_heads, keys[copied] % num_kv_heads
    records = (pages * num_layers + layer) * num_kv_heads + heads
    block_kv[blocks[copied]] = host_kv.view(-1, *run).index_select(0, records)
    counters[Count.RECALLS] += len(records)
    if kv_indices is not None:
        found = table.view(-1)[keys]
        counters[Count.ABSENT_PAGES] += (found < 0).sum()
        kv_indices[misses.entries[:count].long()] = found.clamp(min=0)
