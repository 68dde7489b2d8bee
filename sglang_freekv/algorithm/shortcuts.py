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


class Shortcuts(NamedTuple):
    """What a step has to do."""

    selects: bool  # False: every row is within its budget in the next step
    fills_pages: bool  # False: no token is the last one of its page
    scores_once: bool  # what correction reads is among what the next step needs: one pass over the pages serves both
    every_pair: torch.Tensor | None  # int64, what each layer reads, in order, where that is every page of every request


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
        every_pair=_every_pair(memory, batch, num_pages) if reads_every_page else None,
    )


def _every_pair(memory: KVMemory, batch: Batch, num_pages: list[int]) -> torch.Tensor:
    """The pairs of every page of every request, in the order of the window attention's lists; on a CPU."""
    pairs = pairs_of(batch.page_table[:, : max(num_pages)], memory.geometry.num_kv_heads).transpose(1, 2)
    is_page = torch.arange(pairs.shape[-1]) < batch.num_pages[:, None, None]
    return pairs[is_page.expand_as(pairs)]
