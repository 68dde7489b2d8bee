"""KV memory in the middle of decoding, without the prefill that would have brought it there, and without SGLang.

Rows and pages are given out as SGLang's scheduler would; keys and values are random. Where requests need more tokens
than the store has, they share its pages, each in an order of its own: the traffic of a step is the same, but what one
request made resident another one may find.
"""

from __future__ import annotations

import gc
from itertools import pairwise

import torch

from freekv_kernels import REFERENCE, Batch
from freekv_kernels.fp8 import encode_bounds
from sglang_freekv.algorithm.prefill import start_windows
from sglang_freekv.algorithm.selector import Selector
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import num_pages_of
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import LayerKind

_PAGE = 32
_PIECE_BYTES = 1 << 30  # `PinnedMemory`: the driver's copies stay within a piece
_PAGE_STD = 1.0  # of a page's mean key, relative to its tokens: what makes a page worth selecting


def map_pages(
    req_to_token: torch.Tensor, batch_size: int, context: int, max_steps: int, num_pages: int
) -> tuple[torch.Tensor, bool]:
    """Give rows 1 to `batch_size` of the request table pages 1 to `num_pages`: in any order, each once if they suffice.

    Lengths differ by less than a page, so that in every step some request opens one, as in a server. The pages that
    the steps write belong to one request in any case.

    Parameters
    ----------
    req_to_token : int32, ``[>= batch_size + 1, max_context]``, device
        Written.

    Returns
    -------
    int64, ``[batch_size]``, CPU
        Tokens of each request before the first step.
    bool
        Whether requests share pages.
    """
    device = req_to_token.device
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
    req_to_token[1 : batch_size + 1, : slots[0].numel()] = slots.flatten(1).to(req_to_token.dtype)
    return lengths, shares_pages


def fill_host_store(memory: KVMemory) -> None:
    """Random keys and values in every page, their summaries and codes. Keys of a page have a mean in common."""
    g, device = memory.geometry, memory.device
    encode_pages = REFERENCE.encode_pages if device == "cpu" else memory.ops.encode_pages  # not in an interpreter
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
                encode_pages(last_slots, piece, memory.index.codes[layer.number, filled])
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


def start_rows(
    memory: KVMemory,
    selectors: dict[LayerKind, Selector],
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """What the end of prefill does: first windows, by a random query, and their blocks.

    Parameters
    ----------
    req_to_token : int32, ``[max_requests + 1, max_context]``, device
    rows, lengths : int64, ``[batch_size]``, device
        1, 2, ..., and their tokens.
    """
    g = memory.geometry
    budget_tokens = memory.config.budget_tokens  # of the cell: the memory was built for the largest
    for row in range(1, len(rows) + 1):
        memory.admit(row, budget_tokens)
    num_pages = (lengths + g.page_size - 1) // g.page_size
    longest = int(num_pages.max()) * g.page_size
    batch = Batch(
        rows=rows,
        slots=torch.zeros_like(rows),
        page_table=req_to_token[rows, : longest : g.page_size].long() // g.page_size,
        num_pages=num_pages,
        num_pages_next=lengths // g.page_size + 1,
        budget_pages=rows.new_full((len(rows), g.num_kv_heads), budget_tokens // g.page_size),
        step=memory.blocks.step,
    )
    memory.budgets.start(batch.rows, batch.budget_pages)
    # Mid-decode rows are not scored all in the same steps.
    memory.windows.start(batch.rows)
    num_waiting = torch.arange(batch.budget_pages.numel(), device=rows.device) % memory.config.score_interval
    memory.windows.pace[:, batch.rows, :, 1] = num_waiting.view_as(batch.budget_pages).int()
    memory.tables.clear()
    for layer in memory.layers:
        last_q = torch.randn_like(layer.last_q[rows])
        start_windows(memory, selectors.get(layer.kind), layer, batch, last_q, g.head_dim**-0.5)
