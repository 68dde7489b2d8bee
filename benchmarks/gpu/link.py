"""Phase link: what CPU memory costs, what the link gives a large copy, and what recall gets out of it."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu.link_beside import measure_beside, programs
from benchmarks.gpu.link_pages import HostPages, NoDriver, TimedMemory
from benchmarks.gpu.link_ways import COPY, IN_PLACE, RECALL, attend_in_place, check_copies, ways_of_copies
from benchmarks.gpu.session import Session
from benchmarks.gpu.timing import Stopwatch
from freekv_kernels import recall_blocks_triton
from sglang_freekv.memory.pinned import PinnedMemory
from sglang_freekv.memory.units import GIB

_MISSES = (64, 256, 1024, 4096, 16384)
_PROGRAMS = (16, 32, 64, 128, 256)
_PROGRAMS_AT = (1024, 16384)  # misses at which the number of programs is varied
_COPY_BYTES = GIB


def run(session: Session) -> None:
    g = session.shape.geometry()
    num_bytes = _MISSES[-1] // g.num_kv_heads * g.page_bytes  # the longest list recalls one layer of all of it
    memory = TimedMemory(8 << 20, NoDriver()) if session.is_rehearsal else TimedMemory(num_bytes)
    gib = memory.tensor.nbytes / GIB
    session.record("populate_rate", gib / memory.populate_seconds, "GiB/s", gib=round(gib, 3))
    session.record("register_rate", gib / memory.register_seconds, "GiB/s", gib=round(gib, 3))
    stopwatch = Stopwatch(session.device)
    peak = _measure_copies(session, stopwatch, memory)
    host = HostPages(g, memory, _MISSES[-1], session.device)
    _check_recall(session, host)
    _measure_recall(session, stopwatch, host, peak)
    _measure_beside(session, memory, host)
    _measure_token_major(session, stopwatch, memory, peak)
    start = time.perf_counter()
    memory.unpin()
    session.record("unregister_rate", gib / (time.perf_counter() - start), "GiB/s", gib=round(gib, 3))


def _measure_copies(session: Session, stopwatch: Stopwatch, memory: PinnedMemory) -> float:
    """Rate of a plain copy in both directions, GB/s; the link's measured peak is that to the GPU."""
    size = min(_COPY_BYTES, memory.tensor.nbytes)
    host, device = memory.tensor[:size], torch.empty(size, dtype=torch.uint8, device=session.device)
    rates = {}
    for direction, (target, source) in {"to the GPU": (device, host), "from the GPU": (host, device)}.items():

        def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
            target.copy_(source, non_blocking=True)  # within one piece of `PinnedMemory`

        timing = stopwatch.time(copy, repeats=7, in_graph=False)
        rates[direction] = size / timing.median / 1e9
        session.record("link_copy", rates[direction], "GB/s", direction=direction, bytes=size)
    return rates["to the GPU"]


def _measure_recall(session: Session, stopwatch: Stopwatch, host: HostPages, peak: float) -> None:
    g = host.geometry
    default = recall_blocks_triton._NUM_PROGRAMS
    runs = [(count, default) for count in _MISSES]
    runs += [(count, n) for count in _PROGRAMS_AT for n in _PROGRAMS if n != default]
    for count, num_programs in runs[:1] if session.is_rehearsal else runs:
        if not session.has_time(2, f"recall of {count} with {num_programs} programs"):
            break
        with programs(num_programs):
            timing = stopwatch.time(host.recall, lambda count=count: host.miss(count))
        rate = count * g.block_bytes / timing.median / 1e9
        sizes = {"misses": count, "programs": num_programs, "block_bytes": g.block_bytes}
        session.record("recall_rate", rate, "GB/s", **sizes, share_of_link=round(rate / peak, 3))
        session.record("recall_time", timing.median * 1e6, "us", **sizes, p20=timing.p20 * 1e6, p80=timing.p80 * 1e6)


def _measure_beside(session: Session, memory: PinnedMemory, host: HostPages) -> None:
    count = _MISSES[0 if session.is_rehearsal else -1]  # more than a cache holds
    num_bytes = count * host.geometry.block_bytes
    source = memory.tensor[:num_bytes]
    target = torch.empty(num_bytes, dtype=torch.uint8, device=session.device)
    host.miss(count)
    num_programs = _PROGRAMS[:1] if session.is_rehearsal else _PROGRAMS
    ways = [(COPY, lambda: target.copy_(source, non_blocking=True), 0)]
    ways += [(RECALL, host.recall, count) for count in num_programs]
    ways += [(way, copy, 0) for way, copy in ways_of_copies(session, host).items()]
    measure_beside(session, [*ways, (IN_PLACE, attend_in_place(session, host), 0)], num_bytes)


def _check_recall(session: Session, host: HostPages) -> None:
    """What is recalled is what the host has, bit for bit."""
    g, count = host.geometry, 64
    host.kv.view(torch.int16)[:] = torch.randint(-(2**15), 2**15, host.kv.shape[-2:], dtype=torch.int16)
    host.kv.view(torch.int16)[..., 0, 0] = torch.arange(host.kv[..., 0, 0].numel()).view(host.kv[..., 0, 0].shape)
    host.miss(count)
    host.recall()
    pairs = host.misses.pairs[:count].cpu()
    expected = host.kv[pairs // g.num_kv_heads, g.num_layers // 2, pairs % g.num_kv_heads]
    is_same = torch.equal(host.block_kv[:count].cpu().view(torch.int16), expected.view(torch.int16))
    session.check("recall_blocks copies what the host has", is_same)
    check_copies(session, host)


def _measure_token_major(session: Session, stopwatch: Stopwatch, memory: PinnedMemory, peak: float) -> None:
    """The same recalls from a token-major store, whose runs are `head_dim` elements."""
    from benchmarks.gpu.token_major import recall_token_major

    g = session.shape.geometry()
    layer_page = (2, g.page_size, g.num_kv_heads, g.head_dim)
    elements = 2 * g.page_size * g.num_kv_heads * g.head_dim
    num_pages = memory.tensor.nbytes // (elements * g.dtype.itemsize)
    kv = memory.tensor[: num_pages * elements * g.dtype.itemsize].view(g.dtype).view(num_pages, *layer_page)
    for count in (32,) if session.is_rehearsal else (1024, 16384):
        block_kv = torch.empty((count, 2, g.page_size, g.head_dim), dtype=g.dtype, device=session.device)
        pairs = torch.zeros(count, dtype=torch.int64, device=session.device)
        length = torch.full((1,), count, dtype=torch.int32, device=session.device)
        num_pairs = num_pages * g.num_kv_heads

        def miss(pairs: torch.Tensor = pairs, count: int = count, num_pairs: int = num_pairs) -> None:
            pairs.copy_(torch.randperm(num_pairs, device=pairs.device)[:count])

        def recall(pairs: torch.Tensor = pairs, length: torch.Tensor = length, out: torch.Tensor = block_kv) -> None:
            recall_token_major(kv, pairs, length, out)

        timing = stopwatch.time(recall, miss)
        rate = count * g.block_bytes / timing.median / 1e9
        run_bytes = g.head_dim * g.dtype.itemsize
        session.record(
            "recall_rate_token_major",
            rate,
            "GB/s",
            misses=count,
            run_bytes=run_bytes,
            share_of_link=round(rate / peak, 3),
        )
