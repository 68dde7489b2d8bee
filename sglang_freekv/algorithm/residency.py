"""Residency: give every page of a window a block, and recall what it lacks."""

from __future__ import annotations

import torch

from freekv_kernels import Batch, FlagList, Half
from sglang_freekv.algorithm.refetch import fetch_selected
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import Layer


def make_front_resident(
    memory: KVMemory, layer: Layer, batch: Batch, flags: FlagList, kv_indptr: torch.Tensor, kv_indices: torch.Tensor
) -> None:
    """Fetch what correction selected, and what has lost its block since it was selected; list what attention reads."""
    window, counters = (layer.windows, batch, Half.FRONT), memory.counters.values
    memory.ops.fetch_blocks(*window, layer.store, layer.blocks, layer.front, counters, flags, kv_indptr, kv_indices)


def make_next_resident(memory: KVMemory, layer: Layer, batch: Batch, half: Half) -> None:
    """Recall what the windows of the next step lack: of a step's back half, or of first windows (BOTH)."""
    if memory.config.refetch and half == Half.BACK:
        fetch_selected(memory, layer, batch)
        return
    window, counters = (layer.windows, batch, half), memory.counters.values
    memory.ops.fetch_blocks(*window, layer.store, layer.blocks, layer.back, counters)
