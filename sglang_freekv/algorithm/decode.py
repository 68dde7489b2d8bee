"""Decode: correct windows that lack too much, attend to them, retrieve for the next step.

Per layer:  append -> score, correct flagged rows, select for the next step -> make the front resident -> attend
            beside it, for the next step: make the back resident; with a cosine, which needs no scores, first select
After the logits: finish, for which alone that waits
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from freekv_kernels import Batch, FlagList, Half, lookup_pairs
from sglang_freekv.algorithm.inputs import DecodeInput
from sglang_freekv.algorithm.residency import make_front_resident, make_next_resident
from sglang_freekv.algorithm.selector import Scores, Selector
from sglang_freekv.algorithm.shortcuts import Shortcuts, shortcuts
from sglang_freekv.algorithm.stream import SideStreams
from sglang_freekv.attention.base import DecodeAttention
from sglang_freekv.memory.geometry import num_pages_of
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import DENSE, WINDOWED, Layer, LayerKind
from sglang_freekv.memory.step_tables import RowBudgets


@dataclass
class DecodePlan:
    """One decode step of a batch, the same for all layers."""

    batch: Batch
    flags: list[FlagList]  # per layer
    due: list[FlagList | None]  # per layer, the rows that are scored; None: all that are over their next budget
    rows: list[RowBudgets] | None  # per layer; None where every row has the budget of its request
    sliding: dict[LayerKind, Batch]  # as layers with a sliding window fetch it
    todo: Shortcuts

    def batch_at(self, number: int, half: Half) -> Batch:
        """The batch with the budgets of a layer's rows: in this step, or, once they are found, in the next (BACK)."""
        return self.batch if self.rows is None else self.batch._replace(budget_pages=self.rows[number][half])


class Decode:
    """The decode phase of the engine, for one rank. `plan` once per step, `run` for each layer in order, then `finish`.

    After `plan` nothing is decided on the host, so a CUDA graph can hold the rest: it is captured after a `plan` and
    replayed after others for the same batch size. It must hold `finish`, too.

    Parameters
    ----------
    attentions : LayerKind -> DecodeAttention
        Of every kind of layer that there is, and of WINDOWED.
    selectors : LayerKind -> Selector
        Of every kind that selects.
    streams : SideStreams
    """

    def __init__(
        self,
        memory: KVMemory,
        attentions: dict[LayerKind, DecodeAttention],
        selectors: dict[LayerKind, Selector],
        streams: SideStreams,
    ) -> None:
        self.memory, self.attentions, self.selectors, self._streams = memory, attentions, selectors, streams
        self._plan: DecodePlan | None = None
        self.scales = [1.0] * memory.geometry.num_layers  # of each layer's logits, noted when it runs

    @property
    def last_plan(self) -> DecodePlan | None:
        return self._plan

    def plan(self, step: DecodeInput, in_graph: bool = False) -> DecodePlan:
        """Start a decode step. What a step that did not finish has left beside it comes first.

        Parameters
        ----------
        step : DecodeInput
        in_graph : bool
            Whether the runs are captured in, or replayed from, a CUDA graph.
        """
        memory = self.memory
        self._streams.join()
        num_pages = [num_pages_of(n, memory.geometry.page_size) for n in step.seq_lens_cpu]
        budgets = [memory.budgets.of(row) for row in step.rows_cpu]
        batch = self._write_tables(step, num_pages, in_graph)
        memory.tables.clear()
        if step.seq_lens_cpu:  # a warm-up has padding only: the windows of running requests stay where they are
            memory.begin_step()
        memory.count_tokens(step.seq_lens_cpu, num_pages, budgets)
        self._plan_attention(batch, step, num_pages)
        todo = shortcuts(memory, batch, step, num_pages, budgets, in_graph)
        rows = memory.tables.row_budgets(batch, memory.budgets.of_layers)
        sliding = {kind: windows.in_step(batch) for kind, windows in memory.sliding.items()}
        flags, due = memory.tables.flags(len(step.rows)), [None] * len(memory.layers)
        if memory.config.score_interval > 1:
            due = memory.tables.due(len(step.rows))
        self._plan = DecodePlan(batch, flags, due, rows, sliding, todo)
        return self._plan

    def _write_tables(self, step: DecodeInput, num_pages: list[int], in_graph: bool) -> Batch:
        """Snapshot what the step reads of SGLang's tables, and open the pages that it starts."""
        memory, page_size = self.memory, self.memory.geometry.page_size
        longest = max(num_pages, default=1)
        # A graph holds whole tables; otherwise a CPU need not read beyond the longest request.
        batch = memory.tables.batch(len(step.rows), None if memory.device != "cpu" or in_graph else longest)
        memory.ops.write_tables(
            step.rows,
            step.seq_lens,
            step.slots,
            step.req_to_token,
            memory.budgets.pages,
            page_size,
            batch,
            self.attentions[WINDOWED].last_page_len,
            memory.windows.pages,
            memory.host.filled,
            memory.tables.opened,
        )
        # A warm-up opens no page, but compiles the kernels that do.
        if not step.seq_lens_cpu or any(n % page_size == 1 for n in step.seq_lens_cpu):
            memory.blocks.forget(memory.tables.opened)
            memory.blocks.open(memory.tables.opened)
        return batch

    def _plan_attention(self, batch: Batch, step: DecodeInput, num_pages: list[int]) -> None:
        memory, num_kv_heads = self.memory, self.memory.geometry.num_kv_heads
        padding = [1] * ((len(step.rows) - len(num_pages)) * num_kv_heads)
        longest = (memory.budgets.longest(*request) for request in zip(step.rows_cpu, num_pages, strict=True))
        windowed, dense = self.attentions[WINDOWED], self.attentions.get(DENSE)
        windowed.plan([*itertools.chain.from_iterable(longest), *padding])
        num_rows = len(step.rows) * num_kv_heads
        for kind, attention in self.attentions.items():
            if kind != WINDOWED:  # the same pages in every head and layer
                attention.plan([min(n, attention.max_pages) for n in num_pages for _ in range(num_kv_heads)] + padding)
                attention.last_page_len[:num_rows].copy_(windowed.last_page_len[:num_rows])
        for windows in memory.sliding.values():
            windows.slide(batch)
        if dense is not None:  # layers that attend to every page read the same blocks, so their list is written once
            memory.ops.list_pages(batch, num_kv_heads, dense.kv_indptr[: num_rows + 1], dense.kv_indices)

    def run(
        self,
        number: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer of a decode step.

        Parameters
        ----------
        number : int
            Of the layer.
        q : model dtype, ``[batch_size, num_qo_heads, head_dim]``, post-RoPE
        k, v : model dtype, ``[batch_size, num_kv_heads, head_dim]``, k post-RoPE
        scale : float, of the logits
        sinks : float32, ``[num_qo_heads]``, device, optional
            Logits without a value, one more in each softmax. Pages are chosen without them.

        Returns
        -------
        model dtype, ``[batch_size, num_qo_heads, head_dim]``
        """
        memory, g, plan = self.memory, self.memory.geometry, self._plan
        layer, batch = memory.layers[number], plan.batch_at(number, Half.FRONT)
        self.scales[number] = scale
        q = q.view(-1, g.num_kv_heads, g.group_size, g.head_dim)
        selector, attention, kv_indptr = self.selectors.get(layer.kind), self.attentions[layer.kind], None
        flags, due = (None, None) if selector is None else (plan.flags[number], plan.due[number])
        queries = memory.tables.queries(len(q))
        memory.append(layer, q, k, v, batch, flags, queries, plan.todo.fills_pages, due)
        if selector is not None:
            selector.observe(layer, batch, scale)
            kv_indptr = self._retrieve(layer, selector, attention, flags, scale)
        elif layer.kind.sliding_window is not None:
            self._fetch_sliding(layer, attention)
        q = q if queries is None else queries
        sinks = None if sinks is None else sinks.view(g.num_kv_heads, g.group_size)
        return attention.run(q, layer.store.block_kv, scale, kv_indptr, sinks).flatten(1, 2)

    def finish(self) -> None:
        """Wait for what runs beside the step, on the current stream: after the last that it may run beside."""
        self._streams.join()

    def _fetch_sliding(self, layer: Layer, attention: DecodeAttention) -> None:
        """Fetch what of the latest pages has lost its block; list what attention reads."""
        memory, batch, pairs = self.memory, self._plan.sliding[layer.kind], self._plan.todo.sliding_pairs
        if pairs is None or not lookup_pairs(pairs[layer.kind], layer.blocks, batch.step, attention.kv_indices):
            flags = memory.sliding[layer.kind].flags_of(batch)
            kv_indptr = attention.kv_indptr[: batch.budget_pages.numel() + 1]
            make_front_resident(memory, layer, batch, flags, kv_indptr, attention.kv_indices)

    def _retrieve(
        self, layer: Layer, selector: Selector, attention: DecodeAttention, flags: FlagList, scale: float
    ) -> torch.Tensor | None:
        """Correct and fetch what this step reads; beside what follows, select and fetch what the next step reads.

        Returns
        -------
        int32, ``[num_rows + 1]``, device, or None
            Where the pages of each row start, if that differs from what attention has planned.
        """
        memory, plan, todo, gate = self.memory, self._plan, self._plan.todo, self.memory.config.max_lost_share
        front, scores = plan.batch_at(layer.number, Half.FRONT), None
        if todo.selects and gate is not None:
            # What the next step needs says what this one lacks. On one stream, which the next layer's scores follow.
            due = plan.due[layer.number]
            scores = selector.correct_windows(layer, plan.batch, front.budget_pages, scale, gate, flags, due)
            if plan.rows is not None:  # with budgets of their own
                self._select_next(layer, selector, scale, scores)
        elif todo.selects:
            if todo.scores_once:
                scores = selector.score(layer, plan.batch, Half.BACK, scale)
            selector.write_windows(layer, front, Half.FRONT, scale, flags, scores)
        pairs, own = todo.every_pair, None if plan.rows is None else plan.rows[layer.number].kv_indptr
        if pairs is None or not lookup_pairs(pairs, layer.blocks, front.step, attention.kv_indices):
            kv_indptr = attention.kv_indptr[: len(flags.rows) + 1] if own is None else own
            make_front_resident(memory, layer, front, flags, kv_indptr, attention.kv_indices)
        if todo.selects:
            if gate is None:
                # Not before, though the query is known: what a corrected window holds is listed and favoured, and the
                # latest page may be scored by the keys in its block.
                with self._streams.scan.fork():
                    self._select_next(layer, selector, scale, scores)
            with self._streams.fetch.fork():
                self._streams.scan.join()
                make_next_resident(memory, layer, plan.batch_at(layer.number, Half.BACK), Half.BACK)
        return own

    def _select_next(self, layer: Layer, selector: Selector, scale: float, scores: Scores | None) -> None:
        """Write the windows of the next step, by `scores` where they are known already."""
        batch = self._plan.batch
        if self._plan.rows is not None:
            if scores is None:
                scores = selector.score(layer, batch, Half.BACK, scale)
            batch = selector.apportion(layer, batch, Half.BACK, scores, self._plan.rows[layer.number].back)
        selector.write_windows(layer, batch, Half.BACK, scale, scores=scores)
