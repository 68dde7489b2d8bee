"""Time of one call on the GPU: in a CUDA graph, with a cold L2, alone or as one of several."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU
_HIDE_HOST_CYCLES = 10_000_000  # of the GPU's clock, some 5 ms
_SHORT, _LONG, _REPLAYS = 4, 12, 9  # calls in the graphs of a slope, and how often they are replayed


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
            self._flush = torch.zeros(_FLUSH_BYTES // 4, device=device)
            self._sink = torch.zeros((), device=device)

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

    def slope(self, call: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Timing:
        """What one more `call` adds to a CUDA graph, its launch in the graph included, and that of the graph not.

        Parameters
        ----------
        call, prepare : callable
            Launch kernels or copies only; `prepare` runs before each call, within the graph, and its time is taken off.
        """
        if self.device == "cpu":
            return _timing([_clocked(call, prepare)])

        def cold() -> None:
            prepare()
            # Reading leaves no line in the cache that would have to be written back while `call` runs.
            torch.sum(self._flush, 0, out=self._sink)

        def whole() -> None:
            cold()
            call()

        more, less = self._per_repetition(whole), self._per_repetition(cold)
        return _timing([a - b for a, b in zip(sorted(more), sorted(less), strict=True)])

    def _per_repetition(self, call: Callable[[], object]) -> list[float]:
        """Seconds that a repetition adds to a graph of `call`, several times: graphs of two lengths, by turns."""
        call()  # compiles, and takes what memory it takes
        graphs = []
        for length in (_SHORT, _LONG):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(length):
                    call()
            graph.replay()
            graphs.append(graph)
        seconds = [[self._replay(graph) for graph in graphs] for _ in range(_REPLAYS)]
        return [(long - short) / (_LONG - _SHORT) for short, long in seconds]

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def hide_host() -> None:
    """Keep the current stream waiting while the host launches what is timed behind it."""
    torch.cuda._sleep(_HIDE_HOST_CYCLES)


class TwoStreams:
    """Times what two streams do side by side; on a CPU, which only rehearses, one after the other."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._side = None if device == "cpu" else torch.cuda.Stream(device)

    def together(self, main: Callable[[], object], side: Callable[[], object]) -> tuple[float, float]:
        """Seconds that each takes, where both start at once."""
        if self._side is None:
            return _clocked(main, lambda: None), _clocked(side, lambda: None)
        torch.cuda.synchronize()
        start, main_end, side_end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        hide_host()
        start.record()
        self._side.wait_event(start)
        with torch.cuda.stream(self._side):
            side()
            side_end.record()
        main()
        main_end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(main_end) / 1e3, start.elapsed_time(side_end) / 1e3


def _clocked(call: Callable[[], object], prepare: Callable[[], object]) -> float:
    prepare()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _timing(seconds: list[float]) -> Timing:
    ordered = sorted(seconds)
    return Timing(statistics.median(ordered), ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5])
