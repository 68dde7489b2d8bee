"""Time of one call on the GPU: in a CUDA graph, with a cold L2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU


class Timing(NamedTuple):
    """Seconds."""

    median: float
    p20: float
    p80: float


class Stopwatch:
    """Times calls on a device; on a CPU, which only rehearses, by the clock of the process."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device != "cpu":
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time(
        self,
        call: Callable[[], object],
        prepare: Callable[[], object] = lambda: None,
        repeats: int = 21,
        in_graph: bool = True,
    ) -> Timing:
        """Time of `call`, captured once and replayed unless `in_graph` is false.

        Parameters
        ----------
        call : callable
            Launches kernels or copies only.
        prepare : callable
            Runs before each, untimed; restores what the call changes, at the same addresses.
        """
        if self.device == "cpu":
            return _timing([_clocked(call, prepare) for _ in range(2)])
        prepare()
        call()  # compiles, and takes what memory it takes
        torch.cuda.synchronize()
        if in_graph:
            prepare()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            call = graph.replay
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            prepare()
            # While this runs, the host gets the launch ready: no gap of the host is between the two events.
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return _timing([start.elapsed_time(end) / 1e3 for start, end in events[1:]])

    def floor(self) -> Timing:
        """What an empty graph takes: part of every time above."""
        one = torch.zeros(1, device=self.device)
        return self.time(one.zero_)


def _clocked(call: Callable[[], object], prepare: Callable[[], object]) -> float:
    prepare()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _timing(seconds: list[float]) -> Timing:
    ordered = sorted(seconds)
    return Timing(statistics.median(ordered), ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5])
