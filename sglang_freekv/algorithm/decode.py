"""Decode: attend to the window, correct the heads whose query moved, retrieve for the next step.

Per layer:  append -> correct flagged rows -> make the front resident -> attend
            beside it, for the next step: select -> make the back resident
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from freekv_kernels import REFERENCE, Batch, FlagList, Read, lookup_keys
from sglang_freekv.algorithm.refetch import list_selected
from sglang_freekv.algorithm.stream import SideStream
from sglang_freekv.memory.geometry import num_pages_of
from sglang_freekv.memory.kv_memory import KVMemory, Layer


@dataclass
class DecodePlan:
    """One decode step of a batch, the same for all layers."""

    batch: Batch
    flags: list[FlagList]  # per layer
    may_be_over: bool  # False: every request is within its budget in the next step, so nothing is selected
    ends_page: bool  # False: no token is the last one of its page, so no page is encoded
    every_key: torch.Tensor | None  # int64, what each layer reads, in order, where that is every page of every request


class Retrieval:
    """The decode side of the engine, for one rank. `plan` once per step, then `run` for each layer in order.

    Between `plan` and the last `run` nothing is decided on the host, so a CUDA graph can hold the runs: it is captured
    after a `plan` and replayed after others for the same batch size.

    Parameters
    ----------
    window_attention, dense_attention
        Decode attention over windows, and over every page for dense layers (None without dense layers).
    """

    def __init__(self, memory: KVMemory, window_attention, dense_attention, side: SideStream) -> None:
        self.memory, self._side = memory, side
        self._window_attention, self._dense_attention = window_attention, dense_attention
        self._plan: DecodePlan | None = None
        # The references wait for what they compute, so on a CPU what a step does not need is left out.
        self._may_skip = memory.ops is REFERENCE
        self.scales = [1.0] * memory.geometry.num_layers  # of each layer's logits, noted when it runs

    @property
    def last_plan(self) -> DecodePlan | None:
        return self._plan

    def plan(
        self,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        slots: torch.Tensor,
        req_to_token: torch.Tensor,
        rows_cpu: list[int],
        seq_lens_cpu: list[int],
        in_graph: bool = False,
    ) -> DecodePlan:
        """Start a decode step.

        Parameters
        ----------
        rows : int64, ``[batch_size]``, device
            `req_pool_idx` of every running request; 0 for padding, which comes last.
        seq_lens : int64, ``[batch_size]``, device
            With the new token; 1 for padding.
        slots : int64, ``[num_requests]``, device
            Token slots of the new tokens, without padding.
        req_to_token : int32, ``[max_requests + 1, max_context]``, device
            Token slots, those of the new tokens included.
        rows_cpu, seq_lens_cpu : list of int, ``[num_requests]``
            The same on the host, without padding.
        in_graph : bool
            Whether the runs are captured in, or replayed from, a CUDA graph.
        """
        memory, page_size = self.memory, self.memory.geometry.page_size
        is_on_gpu, batch_size = memory.device != "cpu", len(rows)
        num_pages = [num_pages_of(n, page_size) for n in seq_lens_cpu]
        # A graph holds whole tables; otherwise a CPU need not read beyond the longest request.
        max_pages = None if is_on_gpu or in_graph else max(num_pages, default=1)
        batch = memory.batch(batch_size, max_pages)
        memory.ops.begin_step(
            rows,
            seq_lens,
            slots,
            req_to_token,
            memory.windows.budget_pages,
            page_size,
            batch,
            self._window_attention.last_page_len,
            memory.windows.pages,
            memory.host.filled,
            memory.opened,
        )
        # A warm-up opens no page, but compiles the kernels that do.
        if not seq_lens_cpu or any(n % page_size == 1 for n in seq_lens_cpu):
            memory.blocks.release(memory.opened)
            memory.blocks.open(memory.opened)
        memory.clear_lists()
        if seq_lens_cpu:  # a warm-up has padding only: the windows of running requests stay where they are
            memory.begin_step()
        memory.counters.decoded_tokens += len(seq_lens_cpu)

        padding = [1] * (batch_size - len(num_pages))
        budgets = [memory.windows.budget_of(row) for row in rows_cpu]
        self._window_attention.plan([*map(min, num_pages, budgets), *padding])
        if self._dense_attention is not None:
            self._plan_dense(batch, [*num_pages, *padding])
        # A graph, and a warm-up, which compiles for it, hold everything.
        is_complete = in_graph or not seq_lens_cpu
        is_over = any(n // page_size >= budget for n, budget in zip(seq_lens_cpu, budgets, strict=True))
        is_simple = self._may_skip and not (is_over or is_complete)
        self._plan = DecodePlan(
            batch=batch,
            flags=memory.flags(batch_size),
            may_be_over=is_over or in_graph,
            ends_page=is_complete or any(n % page_size == 0 for n in seq_lens_cpu),
            every_key=self._every_key(batch, num_pages) if is_simple else None,
        )
        return self._plan

    def _every_key(self, batch: Batch, num_pages: list[int]) -> torch.Tensor:
        """The keys of every page of every request, in the order of the window attention's lists."""
        num_kv_heads = self.memory.geometry.num_kv_heads
        keys = batch.page_table[:, None] * num_kv_heads + torch.arange(num_kv_heads)[:, None]
        return torch.cat([own[:, :n].flatten() for own, n in zip(keys, num_pages, strict=True)])

    def _plan_dense(self, batch: Batch, num_pages: list[int]) -> None:
        """Dense layers read the same blocks in the same order, so their list is written once."""
        dense, num_kv_heads = self._dense_attention, self.memory.geometry.num_kv_heads
        dense.plan(num_pages)
        num_rows = len(num_pages) * num_kv_heads
        dense.last_page_len[:num_rows].copy_(self._window_attention.last_page_len[:num_rows])
        self.memory.ops.list_pages(batch, num_kv_heads, dense.kv_indptr[: num_rows + 1], dense.kv_indices)

    def run(self, number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """One layer of a decode step.

        Parameters
        ----------
        number : int
            Of the layer.
        q : model dtype, ``[batch_size, num_qo_heads, head_dim]``, post-RoPE
        k, v : model dtype, ``[batch_size, num_kv_heads, head_dim]``, k post-RoPE
        scale : float, of the logits

        Returns
        -------
        model dtype, ``[batch_size, num_qo_heads, head_dim]``
        """
        memory, g, batch = self.memory, self.memory.geometry, self._plan.batch
        layer, flags = memory.layers[number], self._plan.flags[number]
        self.scales[number] = scale
        q = q.view(-1, g.num_kv_heads, g.group_size, g.head_dim)
        is_dense = number in memory.blocks.dense_layers
        attention = self._dense_attention if is_dense else self._window_attention
        written = (layer.host_kv, layer.summary, layer.block_kv, layer.blocks.table, layer.last_q)
        memory.ops.append_tokens(
            q, k, v, batch, memory.config.tau, *written, None if is_dense else flags, memory.counters.values
        )
        if layer.codes is not None and self._plan.ends_page:
            memory.ops.encode_pages(batch.slots, layer.host_kv, layer.summary, layer.codes)
        may_be_over = self._plan.may_be_over and not is_dense
        scores = None
        if may_be_over:
            if self._may_skip:  # to score twice: what correction reads is among what the next step needs
                scores = score_windows(memory, layer, batch, Read.BACK)
            select_windows(memory, layer, batch, Read.FRONT, scale, flags, scores)
        if not is_dense:
            self._make_front_resident(layer, flags)
        if may_be_over:
            with self._side.fork():
                select_windows(memory, layer, batch, Read.BACK, scale, scores=scores)
                make_resident(memory, layer, batch, Read.BACK)
        out = attention.run(q, layer.block_kv, scale)
        if number == g.num_layers - 1:
            self._side.join()
        return out.flatten(1, 2)

    def _make_front_resident(self, layer: Layer, flags: FlagList) -> None:
        """Fetch what correction selected, and what has lost its block since it was selected."""
        memory, attention, ops = self.memory, self._window_attention, self.memory.ops
        batch, counters, every_key = self._plan.batch, memory.counters.values, self._plan.every_key
        if every_key is not None and lookup_keys(every_key, layer.blocks, batch.step, attention.kv_indices):
            return
        lists = (attention.kv_indptr[: len(flags.rows) + 1], attention.kv_indices)
        ops.lookup_blocks(layer.windows, batch, Read.FRONT, layer.blocks, layer.front, counters, flags, *lists)
        # Stamped for the next step too: a request within its budget reads them again.
        ops.claim_blocks(layer.front, layer.blocks_of_one, batch.step, protect_back=False, stamp_back=True)
        recalled = (layer.block_kv, layer.blocks.table, counters)
        ops.recall_blocks(memory.host.kv, layer.number, layer.front, *recalled, attention.kv_indices)


def score_windows(
    memory: KVMemory, layer: Layer, batch: Batch, read: Read, flags: FlagList | None = None
) -> torch.Tensor:
    """Score the pages of requests over their budget with the latest queries; only for flagged rows if given."""
    workspace = memory.scores[read != Read.FRONT] if read != Read.FIRST else None
    if workspace is not None:
        workspace = workspace[: len(batch.rows) * memory.geometry.num_kv_heads]
    return memory.ops.score_pages(layer.last_q, layer.summary, batch, read, flags, workspace, layer.codes)


def select_windows(
    memory: KVMemory,
    layer: Layer,
    batch: Batch,
    read: Read,
    scale: float,
    flags: FlagList | None = None,
    scores: torch.Tensor | None = None,
) -> None:
    """Select the windows of requests over their budget; only of flagged rows if given. Scores first, if not given."""
    config = memory.config
    if scores is None:
        scores = score_windows(memory, layer, batch, read, flags)
    rule = (config.sink_pages, config.recent_pages, config.group_pooling)
    memory.ops.select_pages(scores, batch, read, *rule, layer.windows, flags, scale)


def make_resident(memory: KVMemory, layer: Layer, batch: Batch, read: Read) -> None:
    """Recall what the next step's windows lack."""
    ops, counters = memory.ops, memory.counters.values
    ops.lookup_blocks(layer.windows, batch, read, layer.blocks, layer.back, counters)
    # Between steps, nothing of what the next step reads may go; in a step, nothing of what this step reads either.
    ops.claim_blocks(layer.back, layer.blocks_of_one, batch.step, protect_back=read == Read.FIRST, stamp_back=True)
    if memory.config.refetch and read == Read.BACK:
        list_selected(layer, batch)
    ops.recall_blocks(memory.host.kv, layer.number, layer.back, layer.block_kv, layer.blocks.table, counters)
