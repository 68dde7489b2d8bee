"""What the pools of one rank take on the device: by page of the host store, and by request."""

from __future__ import annotations

import math
from dataclasses import dataclass

from freekv_kernels import GROUP_PAGES
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry, num_pages_of
from sglang_freekv.memory.layers import DENSE, arena_tokens, kinds_of, num_windowed_layers, sliding_kinds
from sglang_freekv.memory.page_indexes import index_of
from sglang_freekv.memory.sliding import sliding_blocks, sliding_pages
from sglang_freekv.memory.units import GIB
from sglang_freekv.memory.windows import WindowSizes


def bytes_by_page(geometry: Geometry, config: FreeKVConfig) -> int:
    """Of one page of the host store, on the device: what pages are chosen by, and entries of the block table."""
    return index_of(config).page_bytes(geometry) + 4 * geometry.num_layers * geometry.num_kv_heads


def blocks_of_request(geometry: Geometry, config: FreeKVConfig) -> int:
    """In each layer whose windows are chosen. Two are what a step may claim for a request; more are cache."""
    width = WindowSizes.of(config, geometry.page_size).max_budget
    return math.ceil(config.windows * width) * geometry.num_kv_heads


def workspace_bytes(geometry: Geometry, config: FreeKVConfig, max_context: int, max_requests: int) -> int:
    """Device bytes of the tables and lists of a decode step, at fixed addresses for CUDA graphs.

    Not counted: graphs, activations and what prefill allocates; SGLang keeps ``1 - mem_fraction_static`` free for them.

    Parameters
    ----------
    max_context : int
        Most tokens of a request; bounds its page table.
    max_requests : int
        Rows of the largest batch.
    """
    g, sizes = geometry, WindowSizes.of(config, geometry.page_size)
    width, max_pages = sizes.width, num_pages_of(max_context, g.page_size)
    num_listed = sizes.num_listed(config.candidates, max_pages)
    num_scored = sizes.num_scored(config.candidates, max_pages)
    batch = 8 * (max_pages + 4 + g.num_kv_heads + GROUP_PAGES)  # page table, row, slot, lengths, budgets, group
    scores = 2 * 4 * (g.num_qo_heads * num_scored + g.num_kv_heads * (num_listed or 0))  # of the main and side stream
    of_sliding = [sliding_pages(kind, g, max_pages) for kind in sliding_kinds(g)]
    misses = 2 * (8 + 4 + 4) * g.num_kv_heads * max([width, *of_sliding])  # front and back: pair, entry, block
    flags = (4 + (g.num_layers if config.candidates else 1)) * g.num_kv_heads
    due = (4 + g.num_layers) * g.num_kv_heads
    opened = 8 * g.num_kv_heads
    queries = g.num_qo_heads * g.head_dim * g.dtype.itemsize  # of one layer
    widths = [width, *of_sliding, *([max_pages] if DENSE in kinds_of(config, g) else [])]
    attention = 4 * g.num_kv_heads * sum(n + 2 for n in widths)  # kv_indices, kv_indptr, last_page_len
    # Budgets of rows: in this step, in the next, and by row of the request table; kv_indptr.
    by_mass = (3 * 8 + 4) * g.num_layers * g.num_kv_heads if config.mass is not None else 0
    lists = misses + flags + due + opened
    return max_requests * (batch + queries + scores + lists + attention + by_mass)


@dataclass(frozen=True)
class Needs:
    """Bytes, on the device of one rank, that follow from the pages of the host store; and what a request adds."""

    geometry: Geometry
    config: FreeKVConfig
    num_pages: int
    max_context: int | None
    attention_bytes: int

    @property
    def num_pairs(self) -> int:
        """With this many blocks in a layer everything stays resident."""
        return (self.num_pages + 1) * self.geometry.num_kv_heads

    @property
    def num_windowed_layers(self) -> int:
        """Layers whose windows are chosen."""
        return num_windowed_layers(self.config, self.geometry)

    @property
    def dense_bytes(self) -> int:
        """Of the layers that keep every page on the device."""
        return self.num_pairs * kinds_of(self.config, self.geometry).count(DENSE) * self.geometry.block_bytes

    def sliding_bytes(self, num_requests: int) -> int:
        """Blocks of the layers with a sliding window, where so many requests may run."""
        g, max_pages = self.geometry, self.num_pages + 1
        if self.max_context is not None:
            max_pages = min(max_pages, num_pages_of(self.max_context, g.page_size))
        sizes = {"max_pages": max_pages, "max_requests": num_requests, "num_host_pages": self.num_pages + 1}
        kinds = [kind for kind in kinds_of(self.config, g) if kind.sliding_window is not None]
        return sum(sliding_blocks(kind, g, **sizes) for kind in kinds) * g.block_bytes

    @property
    def summaries_bytes(self) -> int:
        return (self.num_pages + 1) * bytes_by_page(self.geometry, self.config)

    @property
    def arena_bytes(self) -> int:
        g = self.geometry
        return 2 * arena_tokens(self.config, g) * 2 * g.num_kv_heads * g.head_dim * g.dtype.itemsize

    @property
    def window_pages(self) -> int:
        """Of a KV head, on the mean over the heads of a request."""
        return WindowSizes.of(self.config, self.geometry.page_size).max_budget

    @property
    def window_bytes(self) -> int:
        """Page lists, latest queries and paces of one request."""
        g = self.geometry
        num_layers = len(g.full_layers)
        last_q_bytes = num_layers * g.num_qo_heads * g.head_dim * g.dtype.itemsize
        width = WindowSizes.of(self.config, g.page_size).width
        return 2 * num_layers * g.num_kv_heads * (width + 1) * 4 + last_q_bytes

    @property
    def row_bytes(self) -> int:
        """Of one request, besides the blocks of its windows that are chosen."""
        return self.window_bytes + self.workspace_bytes(1) + self.sliding_bytes(1)

    @property
    def layer_blocks_bytes(self) -> int:
        """One block in each layer whose windows are chosen."""
        return self.num_windowed_layers * self.geometry.block_bytes

    @property
    def blocks_per_request(self) -> int:
        return blocks_of_request(self.geometry, self.config)

    @property
    def fixed_bytes(self) -> int:
        """What neither blocks nor requests may have."""
        padding_row = self.window_bytes
        return self.dense_bytes + self.summaries_bytes + self.arena_bytes + self.attention_bytes + padding_row

    def workspace_bytes(self, num_requests: int) -> int:
        if self.max_context is None:
            return 0
        return workspace_bytes(self.geometry, self.config, self.max_context, num_requests)

    def asked_blocks_bytes(self) -> int | None:
        """What the user gives to device blocks, but no more than everything takes; None: what is left."""
        if self.config.device_blocks_memory_gib is None:
            return None
        return min(int(self.config.device_blocks_memory_gib * GIB), self.num_pairs * self.layer_blocks_bytes)
