"""The host store: the complete KV cache, head-major in CPU memory, and the page summaries."""

from __future__ import annotations

import torch

from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.pinned import PinnedMemory, allocate


class HostStore:
    """Every token's K and V, once. Pages are handed out by SGLang's allocator: slot // page_size is a page here.

    Owns its tensors for the life of the scheduler. Page 0 is padding, never handed out.

    Attributes
    ----------
    kv : model dtype, ``[num_pages, num_layers, num_kv_heads, 2, page_size, head_dim]``, CPU, pinned for a GPU
        One page is one self-contained record over all layers.
    summary : model dtype, ``[num_layers, num_pages, num_kv_heads, 2, head_dim]``, device
        Minimum and maximum of each page's post-RoPE keys.
    codes : uint8, ``[num_layers, num_pages, num_kv_heads, page_size, head_dim * key_bits // 8]``, device
        Full pages' keys in a few bits; without elements where `key_bits` is 0.
    filled : int32, ``[num_pages]``, device
        Tokens written to each page by its present owner.
    """

    def __init__(self, geometry: Geometry, num_pages: int, device: str) -> None:
        g = geometry
        self.geometry = g
        self.num_pages = num_pages
        shape = (num_pages, g.num_layers, g.num_kv_heads, 2, g.page_size, g.head_dim)
        self._memory: PinnedMemory | None = None
        if device == "cpu":
            memory = allocate(num_pages * g.page_bytes)
        else:
            self._memory = PinnedMemory(num_pages * g.page_bytes)
            memory = self._memory.tensor
        self.kv = memory.view(g.dtype).view(shape)
        self.summary = torch.empty(
            (g.num_layers, num_pages, g.num_kv_heads, 2, g.head_dim), dtype=g.dtype, device=device
        )
        code_shape = (g.num_layers, num_pages, g.num_kv_heads, g.page_size, g.head_dim * g.key_bits // 8)
        self.codes = torch.empty(code_shape, dtype=torch.uint8, device=device)
        self.filled = torch.zeros(num_pages, dtype=torch.int32, device=device)

    def mark_filled(self, slots: torch.Tensor) -> None:
        """Record that tokens are written to `slots` (int64, device); the tokens of a page come in order."""
        pages, offsets = slots // self.geometry.page_size, (slots % self.geometry.page_size).int()
        # The first token of a page starts its count anew; a page's own tokens only raise it.
        self.filled.scatter_(0, pages.where(offsets == 0, 0), 0)
        self.filled.scatter_reduce_(0, pages, offsets + 1, "amax")

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes

    def release(self) -> None:
        """Unpin the memory; no GPU may use the store after this."""
        if self._memory is not None:
            self._memory.release()

    def check_integrity(self) -> None:
        if not ((self.filled >= 0) & (self.filled <= self.geometry.page_size)).all():
            raise RuntimeError("host store: a page claims more tokens than it can hold")
