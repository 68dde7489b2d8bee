"""Append one decoded token per request: to the host store, to the page summary and to its device block."""

from __future__ import annotations

import torch


def append_tokens(
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    host_kv: torch.Tensor,
    summary: torch.Tensor,
    block_kv: torch.Tensor,
    block_table: torch.Tensor,
) -> None:
    """Write-through append of one token per request.

    With page, offset = divmod(slot, page_size), for every KV head h:
      host_kv[page, h, :, offset] = k, v
      summary[page, h] = k, k where offset == 0, else min(., k), max(., k)
      block_kv[block_table[page, h], :, offset] = k, v   where the page's head is resident

    Parameters
    ----------
    k, v : model dtype, ``[batch_size, num_kv_heads, head_dim]``, device
        Post-RoPE keys, and values, of the new tokens.
    slots : int64, ``[batch_size]``, device
        Token slots, all in different pages.
    host_kv : model dtype, ``[num_pages, num_kv_heads, 2, page_size, head_dim]``, CPU
    summary : model dtype, ``[num_pages, num_kv_heads, 2, head_dim]``, device
    block_kv : model dtype, ``[num_blocks, 2, page_size, head_dim]``, device
    block_table : int32, ``[num_pages, num_kv_heads]``, device
        -1 where not resident: the host store then holds the only copy, which a demand miss fetches.

    Notes
    -----
    A page of the last token of a request belongs to it alone, so no two requests write to one page.
    """
    page_size = host_kv.shape[3]
    pages, offsets = slots // page_size, slots % page_size
    kv = torch.stack((k, v), 2)  # [batch_size, num_kv_heads, 2, head_dim]
    host_kv[pages, :, :, offsets] = kv

    bounds = summary[pages].where((offsets > 0)[:, None, None, None], k[:, :, None])
    torch.minimum(bounds[:, :, 0], k, out=bounds[:, :, 0])
    torch.maximum(bounds[:, :, 1], k, out=bounds[:, :, 1])
    summary[pages] = bounds

    blocks = block_table[pages].flatten().long()  # [batch_size * num_kv_heads]
    kv, offsets = kv.flatten(0, 1), offsets.repeat_interleave(block_table.shape[1])
    is_resident = blocks >= 0
    if not is_resident.all():
        blocks, kv, offsets = blocks[is_resident], kv[is_resident], offsets[is_resident]
    block_kv[blocks, :, offsets] = kv
