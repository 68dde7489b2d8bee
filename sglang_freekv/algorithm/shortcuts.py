"""Shortcuts: what a decode step leaves out because the host knows that nothing would come of it.

Ops in a CUDA graph cost a launch where there is nothing to do, and the graph must hold them all. The references on a
CPU wait for what they compute, so there a step is spared whatever its lengths make needless.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from freekv_kernels import Batch, pairs_of
from sglang_freekv.algorithm.inputs import DecodeInput
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import LayerKind


class Shortcuts(NamedTuple):
    """What a step has to do."""

    selects: bool  # False: every row is within its budget in the next step
    fills_pages: bool  # False: no token is the last one of its page
    scores_once: bool  # what correction reads is among what the next step needs: one pass over the pages serves both
    every_pair: torch.Tensor | None  # int64, what each layer reads, in order, where that is every page of every request
    sliding_pairs: dict[LayerKind, torch.Tensor] | None  # int64, what each layer with a sliding window reads, in order


def shortcuts(
    memory: KVMemory,
    batch: Batch,
    step: DecodeInput,
    num_pages: list[int],
    budgets: list[list[int]],
    in_graph: bool,
) -> Shortcuts:
    """Find them for a step whose tables are written.

    Parameters
    ----------
    num_pages : list of int, ``[num_requests]``
        Of the requests, without padding.
    budgets : list of list of int, ``[num_requests][num_kv_heads]``, pages
    in_graph : bool
        Whether the step is captured in, or replayed from, a CUDA graph.
    """
    page_size, may_skip = memory.geometry.page_size, memory.runs_references
    is_over = any(n // page_size >= min(own) for n, own in zip(step.seq_lens_cpu, budgets, strict=True))
    runs_everything = in_graph or not step.seq_lens_cpu  # a warm-up, which has no requests, compiles for a graph
    reads_every_page = may_skip and not (is_over or runs_everything)
    return Shortcuts(
        selects=is_over or in_graph,
        # A kernel looks for itself, and is compiled once.
        fills_pages=not may_skip or runs_everything or any(n % page_size == 0 for n in step.seq_lens_cpu),
        scores_once=may_skip,
        every_pair=_last_pairs(memory, batch, max(num_pages)) if reads_every_page else None,
        sliding_pairs=None
        if runs_everything or not may_skip
        else {kind: _last_pairs(memory, batch, windows.width) for kind, windows in memory.sliding.items()},
    )


def _last_pairs(memory: KVMemory, batch: Batch, width: int) -> torch.Tensor:
    """The pairs of the last `width` pages of every request, in the order of the attention's lists; on a CPU."""
    pages = (batch.num_pages - width).clamp(min=0)[:, None] + torch.arange(width)
    is_page = (pages < batch.num_pages[:, None])[:, None]
    host_pages = batch.page_table.gather(1, pages.clamp_(max=batch.page_table.shape[1] - 1))
    pairs = pairs_of(host_pages, memory.geometry.num_kv_heads).transpose(1, 2)
    return pairs[is_page.expand_as(pairs)]
