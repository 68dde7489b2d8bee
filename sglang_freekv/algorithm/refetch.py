"""Fetch every selected page in every step, resident or not: what a window costs that reuses nothing, for comparison."""

from __future__ import annotations

import torch

from freekv_kernels import Batch, Claim, Half, window_pairs
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import Layer


def fetch_selected(memory: KVMemory, layer: Layer, batch: Batch) -> None:
    """Do what `fetch_blocks` does for the windows of the next step, but copy all of their pages."""
    ops, counters = memory.ops, memory.counters.values
    ops.lookup_blocks(layer.windows, batch, Half.BACK, layer.blocks, layer.back, counters)
    ops.claim_blocks(layer.back, layer.blocks, batch.step, Claim.IN_STEP, counters)
    _list_selected(layer, batch)
    ops.recall_blocks(layer.store, layer.back, counters)


def _list_selected(layer: Layer, batch: Batch) -> None:
    """List every (page, head) of the windows of the next step in `layer.back`, with the block it has.

    A block that is copied again receives the bytes that it holds, so attention may read it meanwhile. Rows within
    their budget at the next step select nothing. A pair that two windows share is listed twice, as each request
    selected it. Decides nothing on the host, so a CUDA graph can hold it.

    Parameters
    ----------
    layer : Layer
        pairs, blocks (-1 where there is nothing to copy) and count of `back` are written.
    batch : Batch
    """
    half = layer.windows.index_select(0, (batch.step + 1) % 2)[0]
    pairs, is_page = window_pairs(half.index_select(0, batch.rows).long(), batch.page_table, batch.num_pages)
    is_over = batch.num_pages_next[:, None] > batch.budget_pages
    num_entries = torch.where(is_over, batch.budget_pages, 0)[..., None]
    is_selected = is_page & (torch.arange(pairs.shape[2], device=pairs.device) < num_entries)
    pairs = pairs.flatten()
    layer.back.pairs[: len(pairs)] = pairs
    layer.back.blocks[: len(pairs)] = layer.blocks.table.view(-1)[pairs].where(is_selected.flatten(), -1)
    layer.back.count.fill_(len(pairs))
