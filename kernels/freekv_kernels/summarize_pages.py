"""Summarise pages: the elementwise minimum and maximum of their post-RoPE keys."""

from __future__ import annotations

import torch

from freekv_kernels.fp8 import decode_fp8, encode_bounds


def summarize_pages(summary: torch.Tensor, k: torch.Tensor, slots: torch.Tensor, page_size: int) -> None:
    """Fold new keys into the summaries of their pages, in place.

    summary[p, h, 0] = min over the tokens of page p of k[token, h];  summary[p, h, 1] = the max.
    Both are rounded outwards, see `fp8`. A token at offset 0 opens its page: what the page's last owner left in the
    summary is dropped.

    Parameters
    ----------
    summary : uint8 (FP8), ``[num_host_pages, num_kv_heads, 2, head_dim]``, device
    k : model dtype, ``[num_tokens, num_kv_heads, head_dim]``, device
        Post-RoPE keys.
    slots : int64, ``[num_tokens]``, device
        Token slots; the tokens of one page are adjacent and in order.
    page_size : int, tokens per page

    Notes
    -----
    A page may be filled by several calls (a chunk may end inside a page), so summaries are updated, not set.
    Source: Quest's min/max digest, as in FreeKV (arXiv 2505.13109).
    """
    pages, counts = torch.unique_consecutive(slots // page_size, return_counts=True)
    last = counts.cumsum(0) - 1
    first = last + 1 - counts
    # The last token stands in for those that the page does not have: it changes no minimum.
    tokens = torch.minimum(first[:, None] + torch.arange(page_size, device=slots.device), last[:, None])
    keys = k.index_select(0, tokens.flatten()).view(len(pages), page_size, *k.shape[1:])
    low, high = keys.amin(1), keys.amax(1)
    known_low, known_high = decode_fp8(summary[pages]).unbind(2)  # [n, num_kv_heads, head_dim] each
    is_opened = (slots[first] % page_size == 0)[:, None, None]
    low = low.where(is_opened, torch.minimum(low, known_low))
    high = high.where(is_opened, torch.maximum(high, known_high))
    summary[pages] = encode_bounds(low, high)
