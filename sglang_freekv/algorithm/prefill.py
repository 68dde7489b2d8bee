"""Prefill: write a chunk through to the host store and attend to the whole prefix, streamed through the arena.

Per layer:  attend to the chunk, then to the prefix, group by group from the arena
            beside it: write the chunk through -> select the first windows -> fill the arena one group ahead
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from freekv_kernels import GROUP_PAGES, Batch, Claim, Half, PairList, pairs_of
from sglang_freekv.algorithm.inputs import ExtendInput
from sglang_freekv.algorithm.residency import make_next_resident
from sglang_freekv.algorithm.selector import Selector
from sglang_freekv.algorithm.stream import SideStreams
from sglang_freekv.attention.base import PrefillAttention
from sglang_freekv.attention.prefix_pieces import PrefixPiece, cut_prefixes, cut_tails
from sglang_freekv.memory.geometry import num_pages_of
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import Layer, LayerKind


@dataclass
class PrefillPlan:
    """One extend batch, the same for all layers."""

    slots: torch.Tensor  # int64 [num_tokens], of the new tokens
    page_starts: torch.Tensor  # int64 [num_runs + 1], index of the first token of each page, and num_tokens
    last_slots: torch.Tensor  # int64 [num_runs], of the last token that the chunk writes to each page
    ended_groups: torch.Tensor  # int64 [num_runs, GROUP_PAGES], host pages of the group that ends with each page, or -1
    opened: PairList  # of the pages whose first token the chunk writes, the newest pages first
    # By the sliding window of a layer, or None: groups of pieces that fit the arena together; int64, their host pages
    groups: dict[int | None, list[list[PrefixPiece]]]
    group_pages: dict[int | None, list[torch.Tensor]]
    completed: Batch  # the requests whose prompt ends with this chunk
    last_tokens: torch.Tensor  # int64, index of the last token of those in the batch
    num_last: torch.Tensor  # int64, tokens of those in the chunk


class Prefill:
    """The prefill phase of the engine, for one rank. `plan` once per batch, `run` for each layer in order, `finish`.

    Everything that touches the host store or the block tables runs on a side stream, in order; so the arena is filled
    while the layer before computes.

    Parameters
    ----------
    attentions : sliding window or None -> PrefillAttention
        None: of the layers whose queries see all tokens.
    selectors : LayerKind -> Selector
        Of every kind that selects.
    streams : SideStreams
    """

    def __init__(
        self,
        memory: KVMemory,
        attentions: dict[int | None, PrefillAttention],
        selectors: dict[LayerKind, Selector],
        streams: SideStreams,
    ) -> None:
        self.memory, self.selectors, self._attentions = memory, selectors, attentions
        self._streams, self._stream = streams, streams.fetch
        self._plan: PrefillPlan | None = None
        self._fills: list[tuple[Layer, torch.Tensor]] = []  # of the plan, in order: host pages of a group, in a layer
        self._num_fills = 0  # of these so far; fill i uses half i % 2 of the arena
        self._filled: torch.cuda.Event | None = None  # after the last of them

    @property
    def last_plan(self) -> PrefillPlan | None:
        return self._plan

    def plan(self, chunk: ExtendInput) -> PrefillPlan:
        """Start an extend batch. What a step that did not finish has left beside it comes first."""
        self._streams.join()
        memory, page_size = self.memory, self.memory.geometry.page_size
        page_table = snapshot_page_table(chunk.rows, chunk.req_to_token, max(chunk.lens), page_size)
        groups = {window: self._groups(window, page_table, chunk.prefix_lens) for window in self._attentions}
        last_tokens = to_device(chunk.last_tokens, memory.device)
        completed = self._first_step(chunk, page_table, last_tokens)
        for windows in memory.sliding.values():
            windows.slide(completed)
        masses = [memory.budgets.mass_of(chunk.rows_cpu[i]) for i in chunk.completed]
        masses = to_device(torch.tensor(masses, dtype=torch.float32), memory.device)
        memory.budgets.start(completed.rows, completed.budget_pages, masses)
        memory.windows.start(completed.rows)
        page_starts = to_device(_page_starts(chunk.prefix_lens, chunk.extend_lens, page_size), memory.device)
        self._plan = PrefillPlan(
            slots=chunk.slots,
            page_starts=page_starts,
            last_slots=chunk.slots[page_starts[1:] - 1],
            ended_groups=self._ended_groups(chunk, page_table),
            opened=self._opened(chunk, page_table),
            groups=groups,
            group_pages={
                window: [torch.cat([piece.pages for piece in group]) for group in own] for window, own in groups.items()
            },
            completed=completed,
            last_tokens=last_tokens,
            num_last=to_device([chunk.extend_lens[i] for i in chunk.completed], memory.device),
        )
        self._begin(chunk)
        return self._plan

    def _groups(self, window: int | None, page_table: torch.Tensor, prefix_lens: list[int]) -> list[list[PrefixPiece]]:
        """What layers with this sliding window, or without one, read of the prefixes."""
        page_size = self.memory.geometry.page_size
        sizes = (page_table, prefix_lens, self.memory.arena.shape[1] // page_size, page_size)
        return list(cut_prefixes(*sizes) if window is None else cut_tails(*sizes, window))

    def _begin(self, chunk: ExtendInput) -> None:
        """Give the pages that the chunk opens to their new owners, and start to fill the arena."""
        plan, memory = self._plan, self.memory
        self._fills = [(layer, own) for layer in memory.layers for own in plan.group_pages[layer.kind.sliding_window]]
        self._num_fills = 0
        layer_bytes = memory.geometry.page_bytes // memory.geometry.num_layers
        memory.counters.arena_filled_bytes += sum(len(pages) for _, pages in self._fills) * layer_bytes
        memory.tables.clear()
        memory.blocks.forget(plan.opened)
        memory.host.mark_filled(plan.slots)
        for window, attention in self._attentions.items():
            attention.plan(chunk.extend_lens, plan.groups[window])
        with self._stream.fork():
            self._stream.keep(plan.slots, plan.page_starts, plan.last_slots, plan.last_tokens, plan.num_last)
            completed = (tensor for tensor in plan.completed if tensor is not None)
            pages = itertools.chain.from_iterable(plan.group_pages.values())
            self._stream.keep(plan.ended_groups, *plan.opened, *pages, *completed)
            self._fill_next()

    def _first_step(self, chunk: ExtendInput, page_table: torch.Tensor, last_tokens: torch.Tensor) -> Batch:
        """The requests whose prompt is complete, at their first decode step."""
        memory, page_size, device = self.memory, self.memory.geometry.page_size, self.memory.device
        final, lens = chunk.completed, chunk.lens
        which = to_device(final, device)
        budgets = [pages for i in final for pages in memory.budgets.of(chunk.rows_cpu[i])]
        return Batch(
            rows=chunk.rows[which].long(),
            slots=chunk.slots[last_tokens],
            page_table=page_table[which],
            num_pages=to_device([num_pages_of(lens[i], page_size) for i in final], device),
            num_pages_next=to_device([num_pages_of(lens[i] + 1, page_size) for i in final], device),
            budget_pages=to_device(budgets, device).view(-1, memory.geometry.num_kv_heads),
            step=memory.blocks.step,
        )

    def _ended_groups(self, chunk: ExtendInput, page_table: torch.Tensor) -> torch.Tensor:
        """Of each page that the chunk writes to, which may be of a group whose first pages are there already."""
        g, device = self.memory.geometry, self.memory.device
        written = [
            (request, page)
            for request, (first, last) in enumerate(zip(chunk.prefix_lens, chunk.lens, strict=True))
            for page in range(first // g.page_size, num_pages_of(last, g.page_size))
        ]
        request, page = to_device([x for place in written for x in place], device).view(-1, 2, 1).unbind(1)
        members = page - torch.arange(GROUP_PAGES - 1, -1, -1, device=device)
        groups = page_table[request, members.clamp(min=0)]
        return groups.where(page % GROUP_PAGES == GROUP_PAGES - 1, -1)

    def _opened(self, chunk: ExtendInput, page_table: torch.Tensor) -> PairList:
        """Pairs of the pages whose first token the chunk writes, the newest pages first; padding has none."""
        g, device = self.memory.geometry, self.memory.device
        opened = [
            (request, page)
            for request, (first, last) in enumerate(zip(chunk.prefix_lens, chunk.lens, strict=True))
            for page in range(num_pages_of(first, g.page_size), num_pages_of(last, g.page_size))
            if chunk.rows_cpu[request] > 0
        ][::-1]
        request, page = to_device([x for place in opened for x in place], device).view(-1, 2).unbind(1)
        pairs = pairs_of(page_table[request, page], g.num_kv_heads)
        return PairList(pairs.flatten(), to_device([pairs.numel()], device).int())

    def run(
        self,
        number: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer of an extend batch; the requests' tokens are concatenated.

        Parameters
        ----------
        number : int
            Of the layer.
        q : model dtype, ``[num_tokens, num_qo_heads, head_dim]``, post-RoPE
        k, v : model dtype, ``[num_tokens, num_kv_heads, head_dim]``, k post-RoPE
        scale : float, of the logits
        sinks : float32, ``[num_qo_heads]``, device, optional
            Logits without a value, one more in each softmax.

        Returns
        -------
        model dtype, ``[num_tokens, num_qo_heads, head_dim]``
        """
        layer = self.memory.layers[number]
        window = layer.kind.sliding_window
        attention = self._attentions[window]
        with self._stream.fork():
            self._stream.keep(q, k, v)
            self._write_through(layer, k, v)
            if len(self._plan.last_tokens):
                self._start_windows(layer, q, scale)
        state = attention.attend_chunk(q, k, v, scale)
        for group in range(len(self._plan.groups[window])):
            half, filled = (self._num_fills - 1) % 2, self._filled
            with self._stream.fork():
                self._fill_next()  # into the half that the attention before has read
            self._stream.wait(filled)
            state = attention.attend_prefix(state, q, group, self.memory.arena[half], scale)
        return attention.finish(state, sinks)

    def finish(self) -> None:
        """Wait for what runs beside the batch, on the current stream: after the last that it may run beside."""
        self._streams.join()

    def _write_through(self, layer: Layer, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the chunk to the host store, to summaries, and to blocks as far as no running request loses one."""
        plan, memory = self._plan, self.memory
        if layer.kind.is_cached:
            memory.ops.claim_blocks(plan.opened, layer.blocks, memory.blocks.step, Claim.AS_OLD, memory.counters.values)
        memory.ops.store_pages(k, v, plan.slots, plan.page_starts, layer.store)
        memory.seal(layer, plan.last_slots, plan.ended_groups)

    def _start_windows(self, layer: Layer, q: torch.Tensor, scale: float) -> None:
        """Select the first windows with the last prompt token's query, or with as many as the selector observes."""
        plan, g, selector = self._plan, self.memory.geometry, self.selectors.get(layer.kind)
        q = q.view(-1, g.num_kv_heads, g.group_size, g.head_dim)
        if selector is not None and selector.num_observed:
            back = torch.arange(selector.num_observed, device=q.device)
            observed = q[(plan.last_tokens[:, None] - back).clamp_(min=0)]
            num_known = plan.num_last.clamp(max=selector.num_observed)
            selector.start(layer, plan.completed, observed, num_known, scale)
        start_windows(self.memory, selector, layer, plan.completed, q[plan.last_tokens], scale)

    def _fill_next(self) -> None:
        """Lay out the next group of prefix pieces: of this layer, or of a later one."""
        if self._num_fills == len(self._fills):
            return
        (layer, pages), half = self._fills[self._num_fills], self._num_fills % 2
        self.memory.ops.fill_arena(self.memory.arena[half], layer.store, pages)
        self._num_fills += 1
        self._filled = self._stream.mark()


def start_windows(
    memory: KVMemory, selector: Selector | None, layer: Layer, batch: Batch, last_q: torch.Tensor, scale: float
) -> None:
    """Give requests, whose prompts are complete, their first windows in one layer, and the windows their blocks.

    Parameters
    ----------
    selector : Selector or None
        None where the layer selects nothing; a sliding window takes the latest pages.
    batch : Batch
        At the requests' first decode step.
    last_q : model dtype, ``[batch_size, num_kv_heads, group_size, head_dim]``, device
        Queries of the prompts' last tokens, which the first step compares its own with.
    scale : float, of the logits
    """
    if layer.kind.sliding_window is not None:
        make_next_resident(memory, layer, memory.sliding[layer.kind].at_start(batch), Half.BOTH)
        return
    layer.last_q[batch.rows] = last_q
    if selector is not None:
        scores = None
        if layer.row_budgets is not None:
            scores = selector.score(layer, batch, Half.BOTH, scale)
            batch = selector.apportion(layer, batch, Half.BOTH, scores, torch.empty_like(batch.budget_pages))
        selector.write_windows(layer, batch, Half.BOTH, scale, scores=scores)
        make_next_resident(memory, layer, batch, Half.BOTH)


def _page_starts(prefix_lens: list[int], extend_lens: list[int], page_size: int) -> list[int]:
    """Index of the first token of each page of a batch, and the number of tokens."""
    starts, first = [], 0
    for prefix, extend in zip(prefix_lens, extend_lens, strict=True):
        starts += [first, *range(first + page_size - prefix % page_size, first + extend, page_size)]
        first += extend
    return [*starts, first]


def to_device(values: list[int] | torch.Tensor, device: str) -> torch.Tensor:
    """Copy to the device, numbers as int64, without waiting for what the device still does."""
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.int64)
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def snapshot_page_table(
    rows: torch.Tensor, req_to_token: torch.Tensor, max_tokens: int, page_size: int
) -> torch.Tensor:
    """Copy the page table of a batch: int64 ``[batch_size, ceil(max_tokens / page_size)]``, logical page -> host page.

    A copy, because the scheduler may rewrite `req_to_token` while the batch runs. Entries past a request are whatever
    an earlier owner of the row left there: existing pages, never read as this request's.
    """
    return req_to_token[rows, :max_tokens:page_size].long() // page_size
