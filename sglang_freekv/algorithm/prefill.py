"""Prefill: write a chunk through to the host store and attend to the whole prefix, streamed through the arena.

Per layer:  attend to the chunk, then to the prefix, group by group from the arena
            beside it: write the chunk through -> select the first windows -> fill the arena one group ahead
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from freekv_kernels import Batch, KeyList, Read
from sglang_freekv.algorithm.decode import make_resident, select_windows
from sglang_freekv.algorithm.stream import SideStream
from sglang_freekv.attention.prefix_pieces import PrefixPiece, cut_prefixes
from sglang_freekv.memory.geometry import num_pages_of
from sglang_freekv.memory.kv_memory import KVMemory, Layer


@dataclass
class PrefillPlan:
    """One extend batch, the same for all layers."""

    slots: torch.Tensor  # int64 [num_tokens], of the new tokens
    page_starts: torch.Tensor  # int64 [num_runs + 1], index of the first token of each page, and num_tokens
    last_slots: torch.Tensor  # int64 [num_runs], of the last token that the chunk writes to each page
    opened: KeyList  # of the pages whose first token the chunk writes, the newest pages first
    groups: list[list[PrefixPiece]]  # the pieces of a group fit the arena together
    group_pages: list[torch.Tensor]  # int64, the host pages of each group
    completed: Batch  # the requests whose prompt ends with this chunk
    last_tokens: torch.Tensor  # int64, index of the last token of those in the batch


class Prefill:
    """The prefill side of the engine, for one rank. `plan` once per batch, then `run` for each layer in order.

    Everything that touches the host store or the block tables runs on the side stream, in order; so the arena is filled
    while the layer before computes.
    """

    def __init__(self, memory: KVMemory, attention, side: SideStream) -> None:
        self.memory, self._attention, self._side = memory, attention, side
        self._plan: PrefillPlan | None = None
        self._num_fills = 0  # of the plan so far; fill i uses half i % 2 of the arena
        self._filled: torch.cuda.Event | None = None  # after the last of them

    @property
    def last_plan(self) -> PrefillPlan | None:
        return self._plan

    def plan(
        self,
        rows: torch.Tensor,
        slots: torch.Tensor,
        req_to_token: torch.Tensor,
        rows_cpu: list[int],
        prefix_lens: list[int],
        extend_lens: list[int],
        is_final: list[bool],
    ) -> PrefillPlan:
        """Start an extend batch.

        Parameters
        ----------
        rows : int64, ``[batch_size]``, device
            `req_pool_idx` of the requests.
        slots : int64, ``[num_tokens]``, device
            Token slots of the chunk; the requests' tokens are concatenated.
        req_to_token : int32, ``[max_requests + 1, max_context]``, device
            Token slots, those of the chunk included.
        rows_cpu : list of int
            `rows` on the host.
        prefix_lens, extend_lens : list of int
            Tokens already in the host store, and tokens of the chunk.
        is_final : list of bool
            Whether the prompt ends with this chunk.
        """
        memory, page_size = self.memory, self.memory.geometry.page_size
        lens = [prefix + extend for prefix, extend in zip(prefix_lens, extend_lens, strict=True)]
        page_table = snapshot_page_table(rows, req_to_token, max(lens), page_size)
        groups = list(cut_prefixes(page_table, prefix_lens, memory.config.arena_pages, page_size))
        completed, last_tokens = self._completed(rows, slots, rows_cpu, page_table, lens, extend_lens, is_final)
        page_starts = to_device(_page_starts(prefix_lens, extend_lens, page_size), memory.device)
        self._plan = PrefillPlan(
            slots=slots,
            page_starts=page_starts,
            last_slots=slots[page_starts[1:] - 1],
            opened=self._opened(page_table, rows_cpu, prefix_lens, lens),
            groups=groups,
            group_pages=[torch.cat([piece.pages for piece in group]) for group in groups],
            completed=completed,
            last_tokens=last_tokens,
        )
        num_pages = sum(map(len, self._plan.group_pages))
        memory.counters.arena_filled_bytes += num_pages * memory.geometry.page_bytes
        memory.clear_lists()
        memory.blocks.release(self._plan.opened)
        memory.host.mark_filled(slots)
        self._attention.plan(extend_lens, groups)
        self._num_fills = 0
        with self._side.fork():
            self._side.keep(slots, page_starts, self._plan.last_slots, last_tokens)
            self._side.keep(*self._plan.opened, *self._plan.group_pages, *completed)
            self._fill_next()
        return self._plan

    def _completed(
        self,
        rows: torch.Tensor,
        slots: torch.Tensor,
        rows_cpu: list[int],
        page_table: torch.Tensor,
        lens: list[int],
        extend_lens: list[int],
        is_final: list[bool],
    ) -> tuple[Batch, torch.Tensor]:
        """The requests whose prompt is complete, at their first decode step, and the index of their last tokens."""
        memory, page_size, device = self.memory, self.memory.geometry.page_size, self.memory.device
        final = [i for i, ends in enumerate(is_final) if ends and rows_cpu[i] > 0]
        which = to_device(final, device)
        last_tokens = to_device([sum(extend_lens[: i + 1]) - 1 for i in final], device)
        batch = Batch(
            rows=rows[which].long(),
            slots=slots[last_tokens],
            page_table=page_table[which],
            num_pages=to_device([num_pages_of(lens[i], page_size) for i in final], device),
            num_pages_next=to_device([num_pages_of(lens[i] + 1, page_size) for i in final], device),
            budget_pages=to_device([memory.windows.budget_of(rows_cpu[i]) for i in final], device),
            step=memory.blocks.step,
        )
        memory.windows.start(batch.rows, batch.budget_pages)
        return batch, last_tokens

    def _opened(
        self, page_table: torch.Tensor, rows_cpu: list[int], prefix_lens: list[int], lens: list[int]
    ) -> KeyList:
        """Keys of the pages whose first token the chunk writes, the newest pages first; padding has none."""
        g, device = self.memory.geometry, self.memory.device
        opened = [
            (request, page)
            for request, (row, first, last) in enumerate(zip(rows_cpu, prefix_lens, lens, strict=True))
            for page in range(num_pages_of(first, g.page_size), num_pages_of(last, g.page_size))
            if row > 0
        ][::-1]
        request, page = to_device([x for pair in opened for x in pair], device).view(-1, 2).unbind(1)
        keys = page_table[request, page][:, None] * g.num_kv_heads + torch.arange(g.num_kv_heads, device=device)
        return KeyList(keys.flatten(), to_device([keys.numel()], device).int())

    def run(self, number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """One layer of an extend batch; the requests' tokens are concatenated.

        Parameters
        ----------
        number : int
            Of the layer.
        q : model dtype, ``[num_tokens, num_qo_heads, head_dim]``, post-RoPE
        k, v : model dtype, ``[num_tokens, num_kv_heads, head_dim]``, k post-RoPE
        scale : float, of the logits

        Returns
        -------
        model dtype, ``[num_tokens, num_qo_heads, head_dim]``
        """
        layer, attention = self.memory.layers[number], self._attention
        with self._side.fork():
            self._side.keep(q, k, v)
            self._write_through(layer, k, v)
            if len(self._plan.last_tokens):
                self._start_windows(layer, q, scale)
        state = attention.attend_chunk(q, k, v, scale)
        for group in range(len(self._plan.groups)):
            half, filled = (self._num_fills - 1) % 2, self._filled
            with self._side.fork():
                self._fill_next()  # into the half that the attention before has read
            self._side.wait(filled)
            state = attention.attend_prefix(state, q, group, self.memory.arena[half], scale)
        if number == self.memory.geometry.num_layers - 1:
            self._side.join()
        return attention.finish(state)

    def _write_through(self, layer: Layer, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the chunk to the host store, to summaries, and to blocks as far as no running request loses one."""
        plan, ops = self._plan, self.memory.ops
        if layer.number not in self.memory.blocks.dense_layers:
            # Stamped as used by the step before: the next decode step may evict them.
            step = self.memory.blocks.step
            ops.claim_blocks(plan.opened, layer.blocks_of_one, step, protect_back=True, stamp_back=False)
        written = (layer.host_kv, layer.summary, layer.block_kv, layer.blocks.table)
        ops.store_pages(k, v, plan.slots, plan.page_starts, *written)
        if layer.codes is not None:
            ops.encode_pages(plan.last_slots, layer.host_kv, layer.summary, layer.codes)

    def _start_windows(self, layer: Layer, q: torch.Tensor, scale: float) -> None:
        """Select the first windows with the last prompt token's query."""
        plan, memory, g = self._plan, self.memory, self.memory.geometry
        batch = plan.completed
        last_q = q[plan.last_tokens].view(-1, g.num_kv_heads, g.group_size, g.head_dim)
        layer.last_q[batch.rows] = last_q
        if layer.number not in memory.blocks.dense_layers:
            select_windows(memory, layer, batch, Read.FIRST, scale)
            make_resident(memory, layer, batch, Read.FIRST)

    def _fill_next(self) -> None:
        """Lay out the next group of prefix pieces: of this layer, or of the next."""
        plan, memory = self._plan, self.memory
        if self._num_fills == len(plan.groups) * memory.geometry.num_layers:
            return
        number, group = divmod(self._num_fills, len(plan.groups))
        layer, half = memory.layers[number], self._num_fills % 2
        pages = plan.group_pages[group]
        memory.ops.fill_arena(memory.arena[half], layer.host_kv, pages, layer.block_kv, layer.blocks.table)
        self._num_fills += 1
        self._filled = self._side.mark()


def _page_starts(prefix_lens: list[int], extend_lens: list[int], page_size: int) -> list[int]:
    """Index of the first token of each page of a batch, and the number of tokens."""
    starts, first = [], 0
    for prefix, extend in zip(prefix_lens, extend_lens, strict=True):
        starts += [first, *range(first + page_size - prefix % page_size, first + extend, page_size)]
        first += extend
    return [*starts, first]


def to_device(values: list[int], device: str) -> torch.Tensor:
    """Copy to an int64 tensor on the device without waiting for what the device still does."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def snapshot_page_table(
    rows: torch.Tensor, req_to_token: torch.Tensor, max_tokens: int, page_size: int
) -> torch.Tensor:
    """Copy the page table of a batch: int64 ``[batch_size, ceil(max_tokens / page_size)]``, logical page -> host page.

    A copy, because the scheduler may rewrite `req_to_token` while the batch runs. Entries past a request are whatever
    an earlier owner of the row left there: existing pages, never read as this request's.
    """
    return req_to_token[rows, :max_tokens:page_size].long() // page_size
