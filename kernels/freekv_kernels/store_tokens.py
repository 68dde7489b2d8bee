"""Write a prefill chunk's keys and values to the host store."""

from __future__ import annotations

import torch


def store_tokens(host_kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """Convert tokens from NHD to head-major pages and store them, once, in place.

    host_kv[slot // page_size, h, 0 | 1, slot % page_size] = k | v of the token.

    Parameters
    ----------
    host_kv : model dtype, ``[num_pages, num_kv_heads, 2, page_size, head_dim]``, CPU
        One layer of the host store (a strided view).
    k, v : model dtype, ``[num_tokens, num_kv_heads, head_dim]``, device
    slots : int64, ``[num_tokens]``, device
    """
    page_size = host_kv.shape[3]
    pages, offsets = slots // page_size, slots % page_size
    host_kv[pages, :, 0, offsets] = k
    host_kv[pages, :, 1, offsets] = v
