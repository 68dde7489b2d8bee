"""Phase host-order: what append writes to the host store is what recall and encode read back, in a CUDA graph.

A kernel's writes to CPU memory must be there for its own program, and for the kernels that follow it in a graph on a
stream that is forked from its own. Pages have no block, so that the host store holds the only copy of what is compared.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.session import Session
from freekv_kernels import GROUP_PAGES, REFERENCE, Batch, MissList, PageStore, pairs_of, triton_ops
from sglang_freekv.algorithm.stream import SideStream
from sglang_freekv.memory.kv_memory import KVMemory

_BATCH, _REPLAYS = 8, 2000
_REHEARSED_BATCH, _REHEARSED_REPLAYS = 2, 6


class WrittenPages:
    """One page of each request, which is written token by token, again and again."""

    def __init__(self, session: Session, batch_size: int) -> None:
        g, device = session.shape.geometry(1), session.device
        num_pairs = batch_size * g.num_kv_heads
        self.memory = KVMemory(
            g,
            session.config,
            num_host_pages=1 + batch_size,
            num_blocks=num_pairs,
            max_requests=batch_size,
            max_context=g.page_size,
            device=device,
            ops=triton_ops(),
        )
        self.geometry, self.layer, self.stream = g, self.memory.layers[0], SideStream(device)
        self.memory.host.kv.zero_()
        self.pages = 1 + torch.arange(batch_size, device=device)
        ones = torch.ones_like(self.pages)
        budgets = ones[:, None].repeat(1, g.num_kv_heads)
        groups = torch.full((batch_size, GROUP_PAGES), -1, device=device)
        slots = torch.zeros_like(self.pages)
        self.batch = Batch(self.pages, slots, self.pages[:, None], ones, ones, budgets, ones[:1], groups)
        pairs = pairs_of(self.pages, g.num_kv_heads).flatten()
        number = torch.arange(num_pairs, dtype=torch.int32, device=device)
        self.misses = MissList(pairs, torch.full_like(number[:1], num_pairs), number, number)
        heads = (batch_size, g.num_kv_heads)
        self.q = torch.randn(*heads, g.group_size, g.head_dim, device=device).to(g.dtype)
        self.k, self.v = torch.zeros((2, *heads, g.head_dim), dtype=g.dtype, device=device)
        # What the pages hold, in the layout of a store of its own.
        self.expected = torch.zeros((*heads, 2, g.page_size, g.head_dim), dtype=g.dtype, device=device)
        self.num_wrong = torch.zeros(2, dtype=torch.int64, device=device)  # of recalled elements, of codes

    def step(self) -> None:
        """What is captured: append, which encodes a page that it fills, then recall on another stream."""
        memory, layer = self.memory, self.layer
        memory.append(layer, self.q, self.k, self.v, self.batch, flags=None, queries=None, fills_pages=True)
        with self.stream.fork():
            memory.ops.recall_blocks(layer.store, self.misses, memory.counters.values)
        self.stream.join()

    def write(self, offset: int) -> None:
        """Choose the tokens of the next step."""
        self.k.normal_()
        self.v.normal_()
        self.batch.slots.copy_(self.pages * self.geometry.page_size + offset)
        self.expected[:, :, 0, offset], self.expected[:, :, 1, offset] = self.k, self.v

    def compare(self, offset: int) -> None:
        """Count, on the device, what differs."""
        recalled = self.layer.store.block_kv.view(self.expected.shape)
        self.num_wrong[0] += (recalled != self.expected).sum()
        if offset == self.geometry.page_size - 1:
            store, written = self.layer.store, self.memory.index.codes[0][1:]
            codes = torch.zeros_like(written)
            own = PageStore(self.expected, store.summary[1:].clone(), store.block_kv, store.table)
            REFERENCE.encode_pages((self.pages - 1) * self.geometry.page_size + offset, own, codes)
            self.num_wrong[1] += (written != codes).sum()


def run(session: Session) -> None:
    batch_size, replays = (_REHEARSED_BATCH, _REHEARSED_REPLAYS) if session.is_rehearsal else (_BATCH, _REPLAYS)
    written = WrittenPages(session, batch_size)
    step, num_done = written.step, 0
    for number in range(2 + replays):
        if session.left < 1:
            break
        offset = (number - 4) % written.geometry.page_size  # a page is full soon
        written.write(offset)
        if number == 2 and session.device == "cuda":  # the steps before have compiled the kernels
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                written.step()
            step = graph.replay
        step()
        written.compare(offset)
        num_done += 1
    session.record("host_order", num_done, "steps")
    recalled, codes = written.num_wrong.tolist()
    if num_done > 4:  # replayed, with a page that is full
        detail = f"{recalled} recalled elements and {codes} bytes of codes differ"
        session.check("what recall and encode read back is what append wrote", recalled == codes == 0, detail)
    written.memory.unpin()
