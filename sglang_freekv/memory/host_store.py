"""The host store: the complete KV cache, head-major in CPU memory."""

from __future__ import annotations

import torch

from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.pinned import PinnedMemory, allocate


class HostStore:
    """Every token's K and V, once. Pages are handed out by SGLang's allocator: slot // page_size is a page here.

    Owns its tensors for the life of the scheduler. Page 0 is padding, never handed out.

    Attributes
    ----------
    kv : ``[num_host_pages, num_layers, num_kv_heads, *record]``, CPU, pinned for a GPU
        One page is one self-contained record over all layers; what the record of a (page, layer, head) looks like is
        the geometry's codec's business.
    filled : int32, ``[num_host_pages]``, device
        Tokens written to each page by its present owner.
    """

    def __init__(self, geometry: Geometry, num_host_pages: int, device: str) -> None:
        g = geometry
        self.geometry = g
        self.num_host_pages = num_host_pages
        record = g.codec.record_shape(g.page_size, g.head_dim)
        num_bytes = num_host_pages * g.page_bytes
        self._memory: PinnedMemory | None = None
        if device == "cpu":
            memory = allocate(num_bytes)
        else:
            self._memory = PinnedMemory(num_bytes)
            memory = self._memory.tensor
        shape = (num_host_pages, g.num_layers, g.num_kv_heads, *record)
        self.kv = memory.view(g.codec.dtype(g.dtype)).view(shape)
        self.filled = torch.zeros(num_host_pages, dtype=torch.int32, device=device)

    def mark_filled(self, slots: torch.Tensor) -> None:
        """Record that tokens are written to `slots` (int64, device); the tokens of a page come in order."""
        pages, offsets = slots // self.geometry.page_size, (slots % self.geometry.page_size).int()
        # The first token of a page starts its count anew; a page's own tokens only raise it.
        self.filled.scatter_(0, pages.where(offsets == 0, 0), 0)
        self.filled.scatter_reduce_(0, pages, offsets + 1, "amax")

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes

    def unpin(self) -> None:
        """Unpin the memory; no GPU may use the store after this."""
        if self._memory is not None:
            self._memory.unpin()

    def check_integrity(self) -> None:
        if not ((self.filled >= 0) & (self.filled <= self.geometry.page_size)).all():
            raise RuntimeError("host store: a page claims more tokens than it can hold")
