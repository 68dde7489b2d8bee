"""What the link carries beside a decode step, and what the step loses: recall against copies and reads in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.gpu.layer_work import LayerWork, attend_blocks, plain_layer
from benchmarks.gpu.session import Session
from benchmarks.gpu.timing import TwoStreams
from freekv_kernels import recall_blocks_triton

_BATCH = 8
_LAYERS, _TRANSFERS = 160, 4  # each some 20 ms alone
_LAYERS_IN_GRAPH = 8
_LONGER = 3  # times, the one that is beside what is timed


@contextmanager
def programs(count: int) -> Iterator[None]:
    """Within, recall has so many programs; the kernel does not know."""
    default, recall_blocks_triton._NUM_PROGRAMS = recall_blocks_triton._NUM_PROGRAMS, count
    try:
        yield
    finally:
        recall_blocks_triton._NUM_PROGRAMS = default


def measure_beside(session: Session, ways: list[tuple[str, Callable[[], object], int]], num_bytes: int) -> None:
    """Rates of all ways, quiet and beside layers with window attention, and how much longer these layers take.

    Parameters
    ----------
    ways : list of (name, callable, int)
        Move `num_bytes` to the GPU; programs of the kernel, 0 for what is not its.
    """
    layers, streams = _repeated_layers(session), TwoStreams(session.device)
    for way, transfer, count in ways:
        if not session.has_time(2, f"{way} beside decode"):
            break
        with programs(count or recall_blocks_triton._NUM_PROGRAMS):
            transfers = _repeated(transfer, 1 if session.is_rehearsal else _TRANSFERS)
            transfers(1)  # compiles
            _measure(session, streams, layers, transfers, num_bytes, {"way": way, "programs": count})


def _repeated(call: Callable[[], object], calls: int) -> Callable[[int], None]:
    def repeat(times: int) -> None:
        for _ in range(times * calls):
            call()

    return repeat


def _repeated_layers(session: Session) -> Callable[[int], None]:
    work = LayerWork(session.shape, _BATCH, session.device)
    layer = plain_layer(work, attend_blocks(session, _BATCH, session.config.budget_tokens))
    layer()
    if session.is_rehearsal:
        return _repeated(lambda: None, 1)  # has run once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_LAYERS_IN_GRAPH):
            layer()
    return _repeated(graph.replay, _LAYERS // _LAYERS_IN_GRAPH)


def _measure(
    session: Session,
    streams: TwoStreams,
    layers: Callable[[int], None],
    transfers: Callable[[int], None],
    num_bytes: int,
    way: dict[str, int | str],
) -> None:
    quiet_layers, _ = streams.together(lambda: layers(1), lambda: None)
    _, quiet_transfers = streams.together(lambda: None, lambda: transfers(1))
    busy_layers, _ = streams.together(lambda: layers(1), lambda: transfers(_LONGER))
    _, busy_transfers = streams.together(lambda: layers(_LONGER), lambda: transfers(1))
    moved = num_bytes * (1 if session.is_rehearsal else _TRANSFERS) / 1e9
    quiet = round(moved / quiet_transfers, 2)
    session.record("rate_beside_decode", moved / busy_transfers, "GB/s", **way, quiet=quiet)
    session.record("decode_beside_transfer", busy_layers / quiet_layers, "times its time alone", **way)
