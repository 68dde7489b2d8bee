"""Recall (page, head) pairs from the host store into the blocks that were claimed for them."""

from __future__ import annotations

import torch

from freekv_kernels.records import records_at
from freekv_kernels.tables import Count, MissList, PageStore


def recall_blocks(
    store: PageStore,
    misses: MissList,
    counters: torch.Tensor,
    kv_indices: torch.Tensor | None = None,
) -> None:
    """Copy the K and V of missing pairs from the host store, once per pair, and complete the window.

    block_kv[misses.blocks[i]] = record of (page, head) read back,  page, head = divmod(misses.pairs[i], num_kv_heads)
    kv_indices[misses.entries[i]] = table[page, head], 0 if it has no block

    Parameters
    ----------
    store : PageStore
        Of one layer; its blocks are written.
    misses : MissList
        After `claim_blocks`; nothing is copied where `blocks` is -1.
    counters : int64, ``[len(Count)]``, device
        RECALLS is advanced by the copies; with kv_indices, ABSENT_PAGES by the entries that have no block.
    kv_indices : int32, device, optional
        Of the front windows.

    Notes
    -----
    A plain record is one contiguous run of ``2 * page_size * head_dim`` elements on both sides: 16 KiB at page 32,
    head_dim 128, bf16. That is what the head-major layout is for.
    """
    count = int(misses.count)
    if count == 0:
        return
    num_kv_heads = store.table.shape[1]
    pairs, blocks = misses.pairs[:count], misses.blocks[:count].long()
    copied = blocks >= 0
    pages, heads = pairs[copied] // num_kv_heads, pairs[copied] % num_kv_heads
    store.block_kv[blocks[copied]] = store.codec.decode(records_at(store.host_kv, pages, heads), store.block_kv.dtype)
    counters[Count.RECALLS] += len(pages)
    if kv_indices is not None:
        found = store.table.view(-1)[pairs]
        counters[Count.ABSENT_PAGES] += (found < 0).sum()
        kv_indices[misses.entries[:count].long()] = found.clamp(min=0)
