"""Fetch every selected page in every step, resident or not: what a window costs that reuses nothing, for comparison."""

from __future__ import annotations

import torch

from freekv_kernels import Batch, window_keys
from sglang_freekv.memory.kv_memory import Layer


def list_selected(layer: Layer, batch: Batch) -> None:
    """List every (page, head) of the windows of the next step in `layer.back`, with the block it has.

    To be called between `claim_blocks` and `recall_blocks`: a block that is copied again receives the bytes that it
    holds, so attention may read it meanwhile. Requests within their budget at the next step select nothing. A pair that
    two windows share is listed twice, as each request selected it. Decides nothing on the host, so a CUDA graph can
    hold it.

    Parameters
    ----------
    layer : Layer
        keys, blocks (-1 where there is nothing to copy) and count of `back` are written.
    batch : Batch
    """
    half = layer.windows.index_select(0, (batch.step + 1) % 2)[0]
    keys, is_page = window_keys(half.index_select(0, batch.rows).long(), batch.page_table, batch.num_pages)
    is_over = batch.num_pages_next > batch.budget_pages
    num_entries = torch.where(is_over, batch.budget_pages, 0)[:, None, None]
    is_selected = is_page & (torch.arange(keys.shape[2], device=keys.device) < num_entries)
    keys = keys.flatten()
    layer.back.keys[: len(keys)] = keys
    layer.back.blocks[: len(keys)] = layer.blocks.table.view(-1)[keys].where(is_selected.flatten(), -1)
    layer.back.count.fill_(len(keys))
