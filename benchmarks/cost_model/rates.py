"""Rates of the machine at hand: a large copy in device memory, matrix products, and recalls over the link."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.link_pages import HostPages, NoDriver, TimedMemory
from benchmarks.gpu.timing import Stopwatch
from freekv_kernels import recall_blocks
from sglang_freekv.memory.geometry import Geometry

# Several times any cache, on each side of a copy; and a list as long as the recalls of a busy step's layer.
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
_HOST_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
_MATRIX = {"cpu": 1024, "cuda": 8192}
_MISSES = 1024
_REPEATS = 5


def measure_rates(device: str, geometry: Geometry) -> dict[str, float]:
    """GB/s of memory (read and written bytes of a copy) and of the link, and matrix operations per second."""
    return {
        "memory_gbs": _memory(device) / 1e9,
        "flops": _matmul(device),
        "link_gbs": _recall(device, geometry) / 1e9,
    }


def _seconds(device: str, call: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
    """Median; a CPU, which a stopwatch times twice at once, is asked more often."""
    stopwatch = Stopwatch(device)
    prepare()
    call()  # the first touches pages
    repeats = _REPEATS if device == "cpu" else 1
    return sorted(stopwatch.time(call, prepare).median for _ in range(repeats))[repeats // 2]


def _memory(device: str) -> float:
    source = torch.zeros(_COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(device, lambda: target.copy_(source))


def _matmul(device: str) -> float:
    n = _MATRIX[device]
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _seconds(device, lambda: torch.mm(a, b, out=out))


def _recall(device: str, geometry: Geometry) -> float:
    """Bytes per second of the op that a step calls; between two places in one memory where there is no GPU."""
    memory = TimedMemory(_HOST_BYTES[device], *([NoDriver()] if device == "cpu" else []))
    try:
        host = HostPages(geometry, memory, _MISSES, device)
        on_cpu = lambda: recall_blocks(host.store, host.misses, host.counters)  # noqa: E731
        recall = on_cpu if device == "cpu" else host.recall
        return _MISSES * geometry.record_bytes / _seconds(device, recall, lambda: host.miss(_MISSES))
    finally:
        memory.unpin()
