"""Encode the keys of full pages in a few bits: what `score_pages` scores tokens by."""

from __future__ import annotations

import torch

from freekv_kernels.fp8 import decode_fp8
from freekv_kernels.tables import PageStore

LEAST_STEP = 1e-30  # where a channel is constant


def encode_pages(slots: torch.Tensor, store: PageStore, codes: torch.Tensor) -> None:
    """Encode the pages that end with one of these slots; others are not full yet, and nobody scores them.

    With lo, hi = summary[page, h] and step = (hi - lo) / 2 ** bits, in fp32:
      code[d] = floor((k[d] - lo[d]) / step[d]), 0 to 2 ** bits - 1;  k'[d] = lo[d] + (code[d] + 1/2) * step[d]

    Parameters
    ----------
    slots : int64, ``[n]``, device
        Token slots that were just written, at most one of a page.
    store : PageStore
        Of one layer, with summaries; the keys are read from the host store.
    codes : uint8, ``[num_host_pages, num_kv_heads, page_size, head_dim * bits // 8]``, device
        Written. Byte j of a token holds channels j, j + n, j + 2n ... from its lowest bits, n bytes per token.

    Notes
    -----
    A range per channel of a page, because keys have channels with values far from the others' (KIVI, arXiv
    2402.02750). Minimum and maximum alone bound every token of a page at once, and most of that bound is nobody's.
    Only keys that FP8 cannot bound, above 448 in magnitude, are not between lo and hi.
    """
    page_size, head_dim = store.block_kv.shape[2:]
    pages = slots[slots % page_size == page_size - 1] // page_size
    if len(pages) == 0:  # most steps of a decode
        return
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
