"""Encode the keys of full pages in a few bits: what `score_pages` scores tokens by."""

from __future__ import annotations

import torch

from freekv_kernels.fp8 import decode_fp8, encode_bounds
from freekv_kernels.tables import PageStore

LEAST_STEP = 1e-30  # where a channel is constant


def encode_pages(
    slots: torch.Tensor, store: PageStore, codes: torch.Tensor, groups: torch.Tensor | None = None
) -> None:
    """Encode the pages that end with one of these slots; others are not full yet, and nobody scores them.

    Before that, the summary of a page that ends a group becomes the bounds of the whole group:
      summary[groups[i, -1], h] = the least lo and the largest hi of summary[groups[i], h]
    With lo, hi = summary[page, h] and step = (hi - lo) / 2 ** bits, in fp32:
      code[d] = floor((k[d] - lo[d]) / step[d]), 0 to 2 ** bits - 1;  k'[d] = lo[d] + (code[d] + 1/2) * step[d]

    Parameters
    ----------
    slots : int64, ``[n]``, device
        Token slots that were just written, at most one of a page.
    store : PageStore
        Of one layer, with summaries, written where groups are; the keys are read from the host store.
    codes : uint8, ``[num_host_pages, num_kv_heads, page_size, head_dim * bits // 8]``, device
        Written. Byte j of a token holds channels j, j + n, j + 2n ... from its lowest bits, n bytes per token.
    groups : int64, ``[n, GROUP_PAGES]``, device, optional
        Host pages of the group that ends with each slot's page, -1 where none does; all but the last one are full.
        None: every page keeps the bounds of its own keys.

    Notes
    -----
    The bounds of a group need no memory of their own, and belong to the page that ends it: requests that share it share
    the pages before it too, and a new owner's first token starts its summary anew.
    A range per channel of a page, because keys have channels with values far from the others' (KIVI, arXiv
    2402.02750). Minimum and maximum alone bound every token of a page at once, and most of that bound is nobody's.
    Only keys that FP8 cannot bound, above 448 in magnitude, are not between lo and hi.
    """
    page_size, head_dim = store.block_kv.shape[2:]
    is_full = slots % page_size == page_size - 1
    pages = slots[is_full] // page_size
    if len(pages) == 0:  # most steps of a decode
        return
    if groups is not None:
        groups = groups[is_full & (groups[:, -1] >= 0)]
        low, high = decode_fp8(store.summary[groups]).unbind(3)  # [n, GROUP_PAGES, num_kv_heads, head_dim]
        store.summary[groups[:, -1]] = encode_bounds(low.amin(1), high.amax(1))
    bits = codes.shape[-1] * 8 // head_dim
    low, step = code_steps(store.summary[pages], bits)
    k = store.codec.decode_keys(store.host_kv, pages, store.block_kv.dtype).float()
    values = ((k - low[:, :, None]) / step[:, :, None]).floor_().clamp_(0, 2**bits - 1).to(torch.uint8)
    parts = values.unflatten(-1, (8 // bits, -1))  # [n, num_kv_heads, page_size, channels in a byte, bytes]
    packed = parts[..., 0, :]
    for i in range(1, 8 // bits):
        packed = packed | (parts[..., i, :] << (i * bits))
    codes[pages] = packed


def code_steps(summary: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lo and step of summaries (uint8, ``[..., 2, head_dim]``): float32, ``[..., head_dim]`` each."""
    low, high = decode_fp8(summary).unbind(-2)
    return low, ((high - low) / 2**bits).clamp_min_(LEAST_STEP)


def unpack_codes(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes one by one, still times the power of 2 that their place in a byte gives them.

    Parameters
    ----------
    codes : uint8, ``[..., page_size, head_dim * bits // 8]``
    bits : int

    Returns
    -------
    uint8, ``[..., head_dim, page_size]``
        A token is a column: what is multiplied with its channels runs along the tokens.
    float32, ``[head_dim]``
        The inverse of the power of 2 of each channel.
    """
    *shape, page_size, num_bytes = codes.shape
    words = codes.transpose(-1, -2).contiguous().flatten(-2).view(torch.int64).unsqueeze(-2)  # eight bytes at a time
    masks = torch.full((8,), 2**bits - 1, dtype=torch.uint8) << torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    parts = (words & masks.view(torch.int64).to(codes.device)).view(torch.uint8)
    units = (0.5 ** torch.arange(0, 8, bits, device=codes.device)).repeat_interleave(num_bytes)
    return parts.view(*shape, num_bytes * 8 // bits, page_size), units
