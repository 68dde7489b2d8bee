"""Requests in the middle of decoding, without the prefill that would have brought them there.

Rows, slots and lengths are given out as SGLang's scheduler would; keys and values are random. Where requests need more
tokens than the pool has, they share its pages, each in an order of its own (`shares_pages`): the traffic of a step is
the same, but what one request made resident another one may find.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from itertools import pairwise

import torch

from benchmarks.gpu.decode_model import WALK_TOKENS
from benchmarks.runner import decode_batch, forward
from freekv_kernels import Batch
from freekv_kernels.fp8 import encode_bounds
from sglang_freekv.algorithm.prefill import start_windows
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import num_pages_of
from sglang_freekv.memory.kv_memory import KVMemory

_PAGE = 32
_PIECE_BYTES = 1 << 30  # `PinnedMemory`: the driver's copies stay within a piece
_PAGE_STD = 1.0  # of a page's mean key, relative to its tokens: what makes a page worth selecting


@dataclass
class Requests:
    """A batch that decodes one token per step; row 0 of the request table is SGLang's padding."""

    runner: object
    rows: torch.Tensor  # int64 [batch_size]
    lengths: torch.Tensor  # int64 [batch_size], CPU: before the next step
    seq_lens: torch.Tensor  # the same on the device
    tokens: torch.Tensor  # int64 [batch_size], of the next step
    shares_pages: bool

    def step(self) -> None:
        """Decode one token of every request; the host does not wait for it."""
        runner = self.runner
        slots = runner.req_to_token_pool.req_to_token[self.rows, self.seq_lens].long()
        self.lengths, self.seq_lens = self.lengths + 1, self.seq_lens + 1
        tokens, self.tokens = self.tokens, (self.tokens + 1) % WALK_TOKENS
        batch = decode_batch(runner, tokens, self.rows, self.seq_lens, self.lengths, slots)
        forward(runner, batch, range(1, len(self.rows) + 1))


def make_requests(runner, batch_size: int, context: int, max_steps: int, num_pages: int) -> Requests:
    """Give out rows and pages 1 to `num_pages`: in any order, each once if there are enough.

    Lengths differ by less than a page, so that in every step some request opens one, as in a server. The pages that
    the steps write belong to one request in any case.
    """
    device = runner.device
    lengths = context - _PAGE + torch.arange(batch_size) % _PAGE
    own = num_pages_of(_PAGE + max_steps, _PAGE) + 1
    shared = num_pages_of(context + max_steps, _PAGE) - own
    order = 1 + torch.randperm(num_pages, device=device)
    tails, pool = order[: batch_size * own].view(batch_size, own), order[batch_size * own :]
    if shares_pages := batch_size * shared > len(pool):
        if shared > len(pool):
            raise ValueError(f"a request of {context} tokens does not fit a pool of {num_pages} pages")
        heads = torch.stack([pool[torch.randperm(len(pool), device=device)[:shared]] for _ in range(batch_size)])
    else:
        heads = pool[: batch_size * shared].view(batch_size, shared)
    slots = torch.cat((heads, tails), 1)[:, :, None] * _PAGE + torch.arange(_PAGE, device=device)
    table = runner.req_to_token_pool.req_to_token
    table[1 : batch_size + 1, : slots[0].numel()] = slots.flatten(1).to(table.dtype)
    rows = torch.arange(1, batch_size + 1, device=device)
    tokens = torch.randint(WALK_TOKENS, (batch_size,), device=device)
    return Requests(runner, rows, lengths, lengths.to(device), tokens, shares_pages)


def fill_host_store(memory: KVMemory) -> None:
    """Random keys and values in every page, their summaries and codes. Keys of a page have a mean in common."""
    g, device = memory.geometry, memory.device
    flat, per_piece = memory.host.kv.flatten(), _PIECE_BYTES // g.dtype.itemsize
    page_elements = g.page_bytes // g.dtype.itemsize
    chunk = max(1, _PIECE_BYTES // g.page_bytes)
    shape = (g.num_layers, g.num_kv_heads, 2, g.page_size, g.head_dim)
    for first in range(0, memory.host.num_host_pages, chunk):
        count = min(chunk, memory.host.num_host_pages - first)
        kv = torch.randn((count, *shape), dtype=g.dtype, device=device)
        kv[:, :, :, 0] += _PAGE_STD * torch.randn((count, *shape[:2], 1, g.head_dim), dtype=g.dtype, device=device)
        low, high = kv[:, :, :, 0].amin(3), kv[:, :, :, 0].amax(3)
        filled = slice(first, first + count)
        memory.index.summaries[:, filled] = encode_bounds(low, high).transpose(0, 1)
        if g.key_bits:
            last_slots = torch.arange(1, count + 1, device=device) * g.page_size - 1
            for layer in memory.layers:
                piece = layer.store._replace(host_kv=kv[:, layer.number], summary=layer.store.summary[filled])
                memory.ops.encode_pages(last_slots, piece, memory.index.codes[layer.number, filled])
        begin, kv = first * page_elements, kv.flatten()
        end = begin + len(kv)
        bounds = [begin, *range((begin // per_piece + 1) * per_piece, end, per_piece), end]
        for start, stop in pairwise(bounds):
            flat[start:stop].copy_(kv[start - begin : stop - begin], non_blocking=True)
    memory.host.filled.fill_(g.page_size)


def restart(memory: KVMemory, config: FreeKVConfig, num_blocks: int) -> None:
    """Give the engine other settings and another number of device blocks, as `KVMemory.start`."""
    gc.collect()  # graphs that were captured before hold the old ones in cycles
    memory.start(config, num_blocks)
    for kv in memory.blocks.kv:
        kv.zero_()  # a page that is opened reads what is there until it is written: no NaN


def give_first_windows(requests: Requests) -> None:
    """What the end of prefill does: first windows, by a random query, and their blocks."""
    prefill, rows, lengths = requests.runner.attn_backend.prefill, requests.rows, requests.seq_lens
    memory = prefill.memory
    g = memory.geometry
    budget_tokens = memory.config.budget_tokens  # of the cell: the memory was built for the largest
    for row in range(1, len(rows) + 1):
        memory.admit(row, budget_tokens)
    num_pages = (lengths + g.page_size - 1) // g.page_size
    longest = int(num_pages.max()) * g.page_size
    batch = Batch(
        rows=rows,
        slots=torch.zeros_like(rows),
        page_table=requests.runner.req_to_token_pool.req_to_token[rows, : longest : g.page_size].long() // g.page_size,
        num_pages=num_pages,
        num_pages_next=lengths // g.page_size + 1,
        budget_pages=rows.new_full((len(rows), g.num_kv_heads), budget_tokens // g.page_size),
        step=memory.blocks.step,
    )
    memory.budgets.start(batch.rows, batch.budget_pages)
    memory.tables.clear()
    for layer in memory.layers:
        last_q = torch.randn_like(layer.last_q[rows])
        start_windows(memory, prefill.selectors.get(layer.kind), layer, batch, last_q, g.head_dim**-0.5)
