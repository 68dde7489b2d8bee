"""The two sides of the engine over one memory, with the attention that the device has."""

from __future__ import annotations

from sglang_freekv.algorithm.decode import Retrieval
from sglang_freekv.algorithm.prefill import Prefill
from sglang_freekv.algorithm.stream import SideStream
from sglang_freekv.memory.kv_memory import KVMemory


def build_engine(memory: KVMemory) -> tuple[Retrieval, Prefill]:
    """Build decode and prefill for one rank: torch attention on a CPU, FlashInfer on a GPU."""
    g, device = memory.geometry, memory.device
    if device == "cpu":
        from sglang_freekv.attention.cpu import TorchPrefillAttention as PrefillAttention
        from sglang_freekv.attention.cpu import TorchWindowAttention as WindowAttention

        workspace = ()
    else:
        from sglang_freekv.attention.gpu import FlashInferPrefillAttention as PrefillAttention
        from sglang_freekv.attention.gpu import FlashInferWindowAttention as WindowAttention
        from sglang_freekv.attention.gpu import allocate_float_workspace

        workspace = (allocate_float_workspace(g, device),)

    sizes = (memory.max_requests, memory.config.max_budget_pages)
    window = WindowAttention(g, *sizes, device, *workspace)
    dense = None
    if memory.config.dense_layers:
        dense = WindowAttention(g, memory.max_requests, memory.max_pages, device, *workspace)
    side = SideStream(device)
    return Retrieval(memory, window, dense, side), Prefill(memory, PrefillAttention(g, *workspace), side)
