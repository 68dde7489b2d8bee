"""Host memory whose pinning is timed, and pages in it that a phase lists and recalls."""

from __future__ import annotations

import os
import time

import torch

from freekv_kernels import Count, MissList, PageStore, recall_blocks_triton
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.pinned import CudaDriver, PinnedMemory


class NoDriver(CudaDriver):
    """For a rehearsal: nothing is pinned."""

    def register(self, address: int, num_bytes: int) -> None:
        return None

    def unregister(self, address: int) -> None:
        return None

    def device_pointer(self, address: int) -> int:
        return address

    def near_cpus(self) -> set[int]:
        return os.sched_getaffinity(0)


class TimedMemory(PinnedMemory):
    """Pinned memory that knows how long its parts took."""

    def _populate(self, pieces: list[tuple[int, int]]) -> None:
        start = time.perf_counter()
        super()._populate(pieces)
        self.populate_seconds = time.perf_counter() - start

    def _register(self, pieces: list[tuple[int, int]]) -> None:
        start = time.perf_counter()
        super()._register(pieces)
        self.register_seconds = time.perf_counter() - start


class HostPages:
    """A host store of one shape in pinned memory, and recalls from it to device blocks."""

    def __init__(self, geometry: Geometry, memory: PinnedMemory, num_blocks: int, device: str) -> None:
        g, self.layer = geometry, geometry.num_layers // 2
        self.geometry = g
        num_pages = memory.tensor.nbytes // g.page_bytes
        shape = (num_pages, g.num_layers, g.num_kv_heads, 2, g.page_size, g.head_dim)
        self.kv = memory.tensor[: num_pages * g.page_bytes].view(g.dtype).view(shape)
        self.num_pairs = num_pages * g.num_kv_heads
        self.block_kv = torch.empty((num_blocks, 2, g.page_size, g.head_dim), dtype=g.dtype, device=device)
        # Every pair has a block, though nobody looks: entries are completed for front windows only.
        self.table = torch.zeros((num_pages, g.num_kv_heads), dtype=torch.int32, device=device)
        self.counters = torch.zeros(len(Count), dtype=torch.int64, device=device)
        self.misses = MissList(
            pairs=torch.zeros(num_blocks, dtype=torch.int64, device=device),
            count=torch.zeros(1, dtype=torch.int32, device=device),
            entries=torch.zeros(num_blocks, dtype=torch.int32, device=device),
            blocks=torch.arange(num_blocks, dtype=torch.int32, device=device),
        )

    def miss(self, count: int) -> None:
        """List `count` other pairs, so that no cache on the way holds them."""
        self.misses.pairs[:count] = torch.randperm(self.num_pairs, device=self.table.device)[:count]
        self.misses.count.fill_(count)

    def recall(self) -> None:
        recall_blocks_triton.recall_blocks(self.store, self.misses, self.counters)

    @property
    def store(self) -> PageStore:
        """Of a layer in the middle."""
        return PageStore(self.kv[:, self.layer], None, self.block_kv, self.table)
