"""The memory side of the engine: host store, device blocks, windows and prefill arena of one rank."""

from __future__ import annotations

import torch

from sglang_freekv.config import FreeKVConfig
from sglang_freekv.counters import Counters
from sglang_freekv.device_blocks import DeviceBlocks
from sglang_freekv.geometry import Geometry
from sglang_freekv.host_store import HostStore
from sglang_freekv.windows import Windows


class KVMemory:
    """All tensors of KV retrieval, allocated once at start-up and released with the scheduler.

    Parameters
    ----------
    geometry : Geometry
    config : FreeKVConfig
    num_pages : int
        Pages of the host store, the padding page 0 included.
    num_blocks : int
        Device blocks per layer; dense layers have one per (page, head) instead.
    max_requests : int
        Rows of SGLang's request table; row 0 is padding and comes on top.
    device : str
    """

    def __init__(
        self,
        geometry: Geometry,
        config: FreeKVConfig,
        *,
        num_pages: int,
        num_blocks: int,
        max_requests: int,
        device: str = "cpu",
    ) -> None:
        self.geometry, self.config, self.max_requests, self.device = geometry, config, max_requests, device
        self.counters = Counters()
        self.host = HostStore(geometry, num_pages, device)
        self.blocks = DeviceBlocks(self.host, self.counters, num_blocks, config.dense_layers, device)
        self.windows = Windows(geometry, max_requests, config.max_budget_pages, device)
        # [layer parity, arena_tokens, 2, num_kv_heads, head_dim]
        self.arena = torch.empty(
            (2, config.arena_tokens, 2, geometry.num_kv_heads, geometry.head_dim),
            dtype=geometry.dtype,
            device=device,
        )

    def admit(self, row: int, budget_tokens: int | None = None) -> None:
        """A request takes `row` of the request table; its budget is the configured one unless given (tokens)."""
        budget_tokens = self.config.budget_tokens if budget_tokens is None else budget_tokens
        self.windows.budget_pages[row] = budget_tokens // self.geometry.page_size

    def begin_write(self, slots: torch.Tensor) -> None:
        """Tokens are about to be written to `slots` (int64): pages that get their first token change owner."""
        opened = slots[slots % self.geometry.page_size == 0] // self.geometry.page_size
        if len(opened):
            self.blocks.reset_pages(opened)
        self.host.mark_filled(slots)

    def begin_step(self) -> None:
        """A decode step starts: the windows written for it come to the front."""
        self.blocks.step += 1
        self.windows.swap()
        self.counters.steps += 1

    def device_bytes(self) -> dict[str, int]:
        """Device memory by purpose, measured from the tensors."""
        return {
            "device_blocks_bytes": self.blocks.nbytes,
            "block_table_bytes": self.blocks.table.nbytes,
            "page_summaries_bytes": self.host.summary.nbytes,
            "windows_bytes": self.windows.nbytes,
            "prefill_arena_bytes": self.arena.nbytes,
        }

    def check_integrity(self) -> None:
        """Raise RuntimeError where an invariant of the pools is broken."""
        self.host.check_integrity()
        self.blocks.check_integrity()
