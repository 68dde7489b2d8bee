"""The host store: the complete KV cache, head-major in CPU memory, and the page summaries."""

from __future__ import annotations

import torch

import freekv_kernels as ops
from sglang_freekv.geometry import Geometry


class HostStore:
    """Every token's K and V, once. Pages are handed out by SGLang's allocator: slot // page_size is a page here.

    Owns its tensors for the life of the scheduler. Page 0 is padding, never handed out.

    Attributes
    ----------
    kv : model dtype, ``[num_pages, num_layers, num_kv_heads, 2, page_size, head_dim]``, CPU
        One page is one self-contained record over all layers.
    summary : model dtype, ``[num_layers, num_pages, num_kv_heads, 2, head_dim]``, device
        Minimum and maximum of each page's post-RoPE keys.
    filled : int32, ``[num_pages]``, CPU
        Tokens written to each page by its present owner.
    """

    def __init__(self, geometry: Geometry, num_pages: int, device: str) -> None:
        g = geometry
        self.geometry = g
        self.num_pages = num_pages
        record = (g.num_layers, g.num_kv_heads, 2, g.page_size, g.head_dim)
        self.kv = torch.empty((num_pages, *record), dtype=g.dtype)
        self.summary = torch.empty(
            (g.num_layers, num_pages, g.num_kv_heads, 2, g.head_dim), dtype=g.dtype, device=device
        )
        self.filled = torch.zeros(num_pages, dtype=torch.int32)

    def mark_filled(self, slots: torch.Tensor) -> None:
        """Record that tokens are written to `slots` (int64); the tokens of a page come in order."""
        pages, offsets = slots // self.geometry.page_size, slots % self.geometry.page_size
        self.filled[pages[offsets == 0]] = 0
        written = (offsets + 1).to(torch.int32)
        self.filled.scatter_reduce_(0, pages, written, "amax")

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Write a prefill chunk: K and V ``[num_tokens, num_kv_heads, head_dim]``, and its pages' summaries."""
        ops.store_tokens(self.kv[:, layer], k, v, slots)
        ops.summarize_pages(self.summary[layer], k, slots, self.geometry.page_size)

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes

    def check_integrity(self) -> None:
        if not ((self.filled >= 0) & (self.filled <= self.geometry.page_size)).all():
            raise RuntimeError("host store: a page claims more tokens than it can hold")
