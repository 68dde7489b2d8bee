"""The memory side of the engine: every tensor of one rank, allocated once at start-up."""

from __future__ import annotations

from typing import NamedTuple

import torch

from freekv_kernels import REFERENCE, Batch, BlockTables, FlagList, KeyList, MissList, Ops, triton_ops
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.counters import Counters
from sglang_freekv.memory.device_blocks import DeviceBlocks
from sglang_freekv.memory.geometry import Geometry, num_pages_of
from sglang_freekv.memory.host_store import HostStore
from sglang_freekv.memory.windows import Windows


class Layer(NamedTuple):
    """What the ops read and write in one layer: views of the tensors of `KVMemory`."""

    number: int
    host_kv: torch.Tensor  # [num_pages, num_kv_heads, 2, page_size, head_dim], CPU
    summary: torch.Tensor  # [num_pages, num_kv_heads, 2, head_dim]
    codes: torch.Tensor | None  # uint8 [num_pages, num_kv_heads, page_size, head_dim * key_bits // 8]
    block_kv: torch.Tensor  # [num_blocks, 2, page_size, head_dim]
    blocks: BlockTables  # without the leading dimension
    blocks_of_one: BlockTables  # with a leading dimension of 1
    windows: torch.Tensor  # int32 [2, max_requests + 1, num_kv_heads, max_budget_pages]
    last_q: torch.Tensor  # [max_requests + 1, num_kv_heads, group_size, head_dim]
    front: MissList  # missing pages of the windows that this step reads
    back: MissList  # of those that the next step reads


class KVMemory:
    """All tensors of KV retrieval, released with the scheduler.

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
    max_context : int
        Most tokens of one request.
    device : str
    ops : Ops, optional
        By default Triton kernels on a GPU, and their references on a CPU.

    Raises
    ------
    ValueError
        If geometry and config differ in what both hold.
    """

    def __init__(
        self,
        geometry: Geometry,
        config: FreeKVConfig,
        *,
        num_pages: int,
        num_blocks: int,
        max_requests: int,
        max_context: int,
        device: str = "cpu",
        ops: Ops | None = None,
    ) -> None:
        g = geometry
        for name in ("page_size", "key_bits"):
            in_geometry, in_config = getattr(g, name), getattr(config, name)
            if in_geometry != in_config:
                raise ValueError(f"{name} is {in_geometry} in the geometry and {in_config} in the config; give one.")
        self.geometry, self.config, self.max_requests, self.device = g, config, max_requests, device
        self.ops = ops or (REFERENCE if device == "cpu" else triton_ops())
        self.max_pages = num_pages_of(max_context, g.page_size)
        self.counters = Counters(g.block_bytes, device)
        self.host = HostStore(g, num_pages, device)
        self.blocks = DeviceBlocks(
            g,
            self.ops,
            num_pages=num_pages,
            num_blocks=num_blocks,
            dense_layers=config.dense_layers,
            device=device,
        )
        self.windows = Windows(g, max_requests, config.max_budget_pages, device)
        # [half, arena_tokens, 2, num_kv_heads, head_dim]
        self.arena = torch.empty((2, config.arena_tokens, 2, g.num_kv_heads, g.head_dim), dtype=g.dtype, device=device)
        self._allocate_step()
        self.layers = [self._layer(number) for number in range(g.num_layers)]

    def _allocate_step(self) -> None:
        """Tables and lists of one step, at fixed addresses, as CUDA graphs hold them."""
        g, max_requests, device = self.geometry, self.max_requests, self.device
        num_rows = max_requests * g.num_kv_heads
        num_entries = num_rows * self.config.max_budget_pages

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        per_request = [zeros(max_requests) for _ in range(5)]
        page_table = zeros(max_requests, self.max_pages)
        self._batch = Batch(*per_request[:2], page_table, *per_request[2:], self.blocks.step)
        self._counts = zeros(3, g.num_layers, 1, dtype=torch.int32)  # of flags, front and back misses
        self._flag_counts = list(self._counts[0])
        # A debug dump tells the flags of every layer; otherwise one after the other uses the same memory.
        num_kept = g.num_layers if self.config.debug_dump else 1
        self._flags = zeros(num_rows, dtype=torch.int32), zeros(num_kept, num_rows, dtype=torch.bool)
        self._misses = [
            (zeros(num_entries), zeros(num_entries, dtype=torch.int32), zeros(num_entries, dtype=torch.int32))
            for _ in ("front", "back")
        ]
        self.opened = KeyList(zeros(num_rows), zeros(1, dtype=torch.int32))
        # Correction runs beside the speculation of an earlier layer, so each has its own. A CPU runs one after the
        # other, and takes memory for the scores that it needs.
        shape = (num_rows, g.group_size, self.max_pages)
        self.scores = [None if device == "cpu" else zeros(*shape, dtype=torch.float32) for _ in ("front", "back")]

    def _layer(self, number: int) -> Layer:
        _, front_count, back_count = self._counts[:, number]
        (front_keys, *front), (back_keys, *back) = self._misses
        blocks_of_one = self.blocks.tables.layers(number, number + 1)
        return Layer(
            number=number,
            host_kv=self.host.kv[:, number],
            summary=self.host.summary[number],
            codes=self.host.codes[number] if self.geometry.key_bits else None,
            block_kv=self.blocks.kv[number],
            blocks=BlockTables(*(tensor[0] for tensor in blocks_of_one)),
            blocks_of_one=blocks_of_one,
            windows=self.windows.pages[:, number],
            last_q=self.windows.last_q[number],
            front=MissList(front_keys, front_count, *front),
            back=MissList(back_keys, back_count, *back),
        )

    def batch(self, batch_size: int, max_pages: int | None = None) -> Batch:
        """The tables for a decode step of `batch_size` requests; of `max_pages` pages where no graph holds them."""
        rows, slots, page_table, *counts, step = self._batch
        per_request = [tensor[:batch_size] for tensor in (rows, slots, *counts)]
        return Batch(*per_request[:2], page_table[:batch_size, :max_pages], *per_request[2:], step)

    def flags(self, batch_size: int) -> list[FlagList]:
        """The lists of flagged rows of all layers, for a batch; one after the other uses the same memory."""
        num_rows = batch_size * self.geometry.num_kv_heads
        rows, is_flagged = (tensor[..., :num_rows] for tensor in self._flags)
        per_layer = is_flagged.expand(self.geometry.num_layers, -1)
        return [FlagList(rows, *of_layer) for of_layer in zip(self._flag_counts, per_layer, strict=True)]

    def admit(self, row: int, budget_tokens: int | None = None) -> None:
        """A request takes `row` of the request table; its budget is the configured one unless given (tokens)."""
        budget_tokens = self.config.budget_tokens if budget_tokens is None else budget_tokens
        self.windows.admit(row, budget_tokens // self.geometry.page_size)

    def clear_lists(self) -> None:
        """Empty the lists of all layers."""
        self._counts.zero_()

    def begin_step(self) -> None:
        """A decode step starts: the windows written for it come to the front."""
        self.counters.steps += 1
        self.blocks.begin_step(self.counters.steps)

    def device_bytes(self) -> dict[str, int]:
        """Device memory by purpose, measured from the tensors."""
        scores = sum(tensor.nbytes for tensor in self.scores if tensor is not None)
        lists = sum(tensor.nbytes for lists in self._misses for tensor in lists)
        return {
            "device_blocks_bytes": self.blocks.nbytes,
            "block_table_bytes": sum(tensor.nbytes for tensor in self.blocks.tables),
            "page_summaries_bytes": self.host.summary.nbytes + self.host.codes.nbytes,
            "windows_bytes": self.windows.nbytes,
            "prefill_arena_bytes": self.arena.nbytes,
            "workspace_bytes": scores + lists + self._batch.page_table.nbytes,
        }

    def release(self) -> None:
        """Give the host store's memory back to the system."""
        self.host.release()

    def check_integrity(self) -> None:
        """Raise RuntimeError where an invariant of the pools is broken."""
        self.host.check_integrity()
        self.blocks.check_integrity()
