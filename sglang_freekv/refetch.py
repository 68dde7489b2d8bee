"""Fetch every selected page in every step, resident or not: what a window costs that reuses nothing, for comparison."""

from __future__ import annotations

import torch

from freekv_kernels import Batch
from sglang_freekv.kv_memory import Layer


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
    num_kv_heads, width = layer.windows.shape[2:]
    half = layer.windows.index_select(0, (batch.step + 1) % 2)[0]
    window = half.index_select(0, batch.rows).long()  # [batch_size, num_kv_heads, width]
    num_pages, budget = batch.num_pages[:, None, None], batch.budget_pages[:, None, None]
    is_over = (batch.num_pages_next > batch.budget_pages)[:, None, None]
    is_entry = torch.arange(width, device=window.device) < budget
    is_selected = (window >= 0) & (window < num_pages) & is_entry & is_over
    pages = batch.page_table.gather(1, window.clamp(0, batch.page_table.shape[1] - 1).flatten(1)).view_as(window)
    keys = (pages * num_kv_heads + torch.arange(num_kv_heads, device=window.device)[:, None]).flatten()
    blocks = layer.blocks.table.view(-1)[keys].where(is_selected.flatten(), -1)
    layer.back.keys[: len(keys)] = keys
    layer.back.blocks[: len(keys)] = blocks
    layer.back.count.fill_(len(keys))
