"""Residency: give every page of a window a block, and recall what it lacks."""

from __future__ import annotations

import torch

from freekv_kernels import Batch, Claim, FlagList, Half
from sglang_freekv.algorithm.refetch import list_selected
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import Layer


def make_front_resident(
    memory: KVMemory, layer: Layer, batch: Batch, flags: FlagList, kv_indptr: torch.Tensor, kv_indices: torch.Tensor
) -> None:
    """Fetch what correction selected, and what has lost its block since it was selected; list what attention reads."""
    ops, counters = memory.ops, memory.counters.values
    lists = (flags, kv_indptr, kv_indices)
    ops.lookup_blocks(layer.windows, batch, Half.FRONT, layer.blocks, layer.front, counters, *lists)
    # Stamped for the next step too: a request within its budget reads them again.
    ops.claim_blocks(layer.front, layer.blocks, batch.step, Claim.IN_STEP, counters)
    ops.recall_blocks(layer.store, layer.front, counters, kv_indices)


def make_next_resident(memory: KVMemory, layer: Layer, batch: Batch, half: Half) -> None:
    """Recall what the windows of the next step lack: of a step's back half, or of first windows (BOTH)."""
    ops, counters = memory.ops, memory.counters.values
    ops.lookup_blocks(layer.windows, batch, half, layer.blocks, layer.back, counters)
    claim = Claim.BETWEEN_STEPS if half == Half.BOTH else Claim.IN_STEP
    ops.claim_blocks(layer.back, layer.blocks, batch.step, claim, counters)
    if memory.config.refetch and half == Half.BACK:
        list_selected(layer, batch)
    ops.recall_blocks(layer.store, layer.back, counters)
