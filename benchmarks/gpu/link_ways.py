"""Ways to bring the same pages to the GPU: a kernel, copies in a batch, copies one by one, and attention in place.

Copies are launched by the host, which a list of misses on the device must have reached first; that wait is not in their
numbers. Attention in place reads pages over the link again in each step that selects them, and keeps none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from benchmarks.gpu.link_pages import HostPages
from benchmarks.gpu.session import Session
from benchmarks.gpu.stand_in_attention import StandInAttention

COPY, RECALL, BATCH, ONE_BY_ONE, IN_PLACE = "copy", "recall", "copies in a batch", "copies one by one", "in place"


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes of CUDA 13."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", _Location),
        ("destination_hint", _Location),
        ("flags", ctypes.c_uint),
    )


class Copies:
    """Copies of the listed pages by the copy engines; the list is read once, when this is made."""

    _IN_STREAM_ORDER = 1

    def __init__(self, host: HostPages) -> None:
        count = int(host.misses.count)
        pairs, blocks = host.misses.pairs[:count].tolist(), host.misses.blocks[:count].tolist()
        heads, layer = host.geometry.num_kv_heads, host.layer
        self.pairs = [
            (host.block_kv[block], host.kv[pair // heads, layer, pair % heads])
            for pair, block in zip(pairs, blocks, strict=True)
        ]
        self._count = count
        self._to, self._from = (
            (ctypes.c_void_p * count)(*(pair[side].data_ptr() for pair in self.pairs)) for side in (0, 1)
        )
        self._sizes = (ctypes.c_size_t * count)(*([host.geometry.block_bytes] * count))

    def one_by_one(self) -> None:
        for target, source in self.pairs:
            target.copy_(source, non_blocking=True)

    def in_a_batch(self) -> None:
        """One call for all of them, on the current stream, which must not be CUDA's default.

        Raises
        ------
        RuntimeError
            If CUDA refuses it.
        """
        if not self.pairs[0][0].is_cuda:
            self.one_by_one()
            return
        runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")
        attributes, first = _Attributes(source_access_order=self._IN_STREAM_ORDER), ctypes.c_size_t(0)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = runtime.cudaMemcpyBatchAsync(
            self._to,
            self._from,
            self._sizes,
            ctypes.c_size_t(self._count),
            ctypes.byref(attributes),
            ctypes.byref(first),
            ctypes.c_size_t(1),
            stream,
        )
        if status:
            raise RuntimeError(f"cudaMemcpyBatchAsync of {self._count} pages: CUDA error {status}")


def can_batch() -> bool:
    """Whether the call is there, as CUDA 13 has it; a rehearsal copies one by one."""
    return torch.version.cuda is None or int(torch.version.cuda.partition(".")[0]) >= 13


def attend_in_place(session: Session, host: HostPages) -> Callable[[], object]:
    """Attention to the listed pages where they are, as many rows as a batch of 32 has."""
    g, count = session.shape.geometry(1), int(host.misses.count)
    num_rows = min(count, 32 * g.num_kv_heads)
    batch_size, pages_per_row = num_rows // g.num_kv_heads, count // num_rows
    attention = StandInAttention(g, batch_size, pages_per_row, session.device)
    attention.plan([pages_per_row] * num_rows)
    attention.last_page_len.fill_(g.page_size)
    pairs = host.misses.pairs[: num_rows * pages_per_row]
    page, head = pairs // g.num_kv_heads, pairs % g.num_kv_heads
    records = (page * host.geometry.num_layers + host.layer) * g.num_kv_heads + head
    attention.kv_indices[: len(records)] = records.int()
    records_kv = host.kv.view(-1, 2, g.page_size, g.head_dim)
    q = torch.randn((batch_size, g.num_kv_heads, g.group_size, g.head_dim), device=session.device).to(g.dtype)
    return lambda: attention.run(q, records_kv, g.head_dim**-0.5)


def check_copies(session: Session, host: HostPages) -> None:
    """What copies bring is what the host has, bit for bit."""
    for name, copy in ways_of_copies(session, host).items():
        host.block_kv.zero_()
        if session.device == "cpu":
            copy()
        else:
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                copy()
            torch.cuda.synchronize()
        pages = Copies(host).pairs
        same = all(torch.equal(target.cpu().view(torch.int16), source.view(torch.int16)) for target, source in pages)
        session.check(f"{name} bring what the host has", same and len(pages) > 0)


def ways_of_copies(session: Session, host: HostPages) -> dict[str, Callable[[], object]]:
    copies = Copies(host)
    ways = {BATCH: copies.in_a_batch, ONE_BY_ONE: copies.one_by_one}
    if not can_batch():
        session.say(f"NOT MEASURED: {BATCH}, which want CUDA 13, and this is {torch.version.cuda}")
        del ways[BATCH]
    return ways
