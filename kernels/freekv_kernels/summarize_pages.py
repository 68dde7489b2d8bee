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
    pages, page_of_token = torch.unique_consecutive(slots // page_size, return_inverse=True)
    offsets = slots % page_size
    opened = pages.new_zeros(len(pages), dtype=torch.bool)
    opened[page_of_token[offsets == 0]] = True

    known = decode_fp8(summary[pages])  # [n, num_kv_heads, 2, head_dim]
    known[opened, :, 0] = float("inf")
    known[opened, :, 1] = float("-inf")
    shape = (len(pages), page_size, *k.shape[1:])
    low = k.new_full(shape, float("inf")).index_put_((page_of_token, offsets), k).amin(1)
    high = k.new_full(shape, float("-inf")).index_put_((page_of_token, offsets), k).amax(1)
    summary[pages] = encode_bounds(torch.minimum(known[:, :, 0], low), torch.maximum(known[:, :, 1], high))
