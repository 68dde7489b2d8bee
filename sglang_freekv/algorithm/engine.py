"""The two phases of the engine over one memory, with the attention that the device has."""

from __future__ import annotations

from sglang_freekv.algorithm.decode import Decode
from sglang_freekv.algorithm.prefill import Prefill
from sglang_freekv.algorithm.selectors import SELECTORS
from sglang_freekv.algorithm.stream import SideStreams
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import DENSE, WINDOWED


def build_engine(memory: KVMemory) -> tuple[Decode, Prefill]:
    """Build decode and prefill for one rank: torch attention on a CPU, FlashInfer on a GPU."""
    g, device = memory.geometry, memory.device
    if device == "cpu":
        from sglang_freekv.attention.cpu import TorchPrefillAttention as PrefillAttention
        from sglang_freekv.attention.cpu import TorchSlidingPrefillAttention as SlidingPrefillAttention
        from sglang_freekv.attention.cpu import TorchWindowAttention as WindowAttention

        workspace = ()
    else:
        from sglang_freekv.attention.gpu import FlashInferPrefillAttention as PrefillAttention
        from sglang_freekv.attention.gpu import FlashInferWindowAttention as WindowAttention
        from sglang_freekv.attention.gpu import allocate_float_workspace
        from sglang_freekv.attention.gpu_sliding import FlashInferSlidingPrefillAttention as SlidingPrefillAttention

        workspace = (allocate_float_workspace(g, device),)

    # Most pages that a row reads.
    widths = {WINDOWED: memory.sizes.width, DENSE: memory.max_pages}
    widths |= {kind: windows.width for kind, windows in memory.sliding.items()}
    attentions = {
        kind: WindowAttention(g, memory.max_requests, width, device, *workspace, sliding_window=kind.sliding_window)
        for kind, width in widths.items()
        if kind == WINDOWED or kind in memory.kinds
    }
    prefill_attentions = {None: PrefillAttention(g, *workspace)} | {
        kind.sliding_window: SlidingPrefillAttention(g, *workspace, sliding_window=kind.sliding_window)
        for kind in memory.sliding
    }
    selector = SELECTORS[memory.config.selector_name](memory)
    selectors = {kind: selector for kind in widths if kind.selects}
    streams = SideStreams(device)
    decode = Decode(memory, attentions, selectors, streams)
    return decode, Prefill(memory, prefill_attentions, selectors, streams)
