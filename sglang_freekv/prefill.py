"""Prefill: write a chunk through to the host store and attend to the whole prefix, streamed through the arena."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

import freekv_kernels as ops
from sglang_freekv.kv_memory import KVMemory
from sglang_freekv.page_table import num_pages_of, snapshot_page_table, window_keys
from sglang_freekv.retrieval import prefetch_window


@dataclass(frozen=True)
class PrefixPiece:
    """A run of one request's prefix pages, as laid out in the arena."""

    request: int  # index in the batch
    pages: torch.Tensor  # int64 [num_pages], host pages
    first_token: int  # in the arena
    num_tokens: int  # fewer than the pages hold where the prefix ends inside a page


@dataclass
class PrefillPlan:
    """One extend batch, the same for all layers."""

    rows: torch.Tensor  # int64 [batch_size]
    slots: torch.Tensor  # int64 [num_tokens], of the new tokens
    page_table: torch.Tensor  # int64 [batch_size, max_pages]
    queries: list[slice]  # of each request in the batch's tokens
    groups: list[list[PrefixPiece]]  # the pieces of a group fit the arena together
    new_keys: torch.Tensor  # int64, (page, head) keys of the written pages, the newest pages first
    final: torch.Tensor  # int64, batch indices of the requests whose prompt is complete
    num_pages: torch.Tensor  # int64 [batch_size], after the chunk
    num_pages_next: torch.Tensor  # int64 [batch_size], at the first decode step


class Prefill:
    """The prefill side of the engine, for one rank. `plan` once per batch, then `run` for each layer in order."""

    def __init__(self, memory: KVMemory) -> None:
        self.memory = memory
        self._plan: PrefillPlan | None = None

    @property
    def last_plan(self) -> PrefillPlan | None:
        return self._plan

    def plan(
        self,
        rows: torch.Tensor,
        req_to_token: torch.Tensor,
        prefix_lens: list[int],
        extend_lens: list[int],
        is_final: list[bool],
    ) -> PrefillPlan:
        """Start an extend batch.

        Parameters
        ----------
        rows : int64, ``[batch_size]``
            `req_pool_idx` of the requests.
        req_to_token : int32, ``[max_requests + 1, max_context]``
            Token slots, those of the chunk included.
        prefix_lens, extend_lens : list of int
            Tokens already in the host store, and tokens of the chunk.
        is_final : list of bool
            Whether the prompt ends with this chunk.
        """
        memory, page_size = self.memory, self.memory.geometry.page_size
        rows = rows.long()
        lens = [prefix + extend for prefix, extend in zip(prefix_lens, extend_lens, strict=True)]
        spans = zip(rows.tolist(), prefix_lens, lens, strict=True)
        slots = torch.cat([req_to_token[row, prefix:end] for row, prefix, end in spans]).long()
        page_table = snapshot_page_table(rows, req_to_token, max(lens), page_size)
        memory.begin_write(slots)

        ends = torch.tensor(extend_lens).cumsum(0).tolist()
        num_heads = memory.geometry.num_kv_heads
        pages = torch.unique_consecutive(slots // page_size).flip(0)
        self._plan = PrefillPlan(
            rows=rows,
            slots=slots,
            page_table=page_table,
            queries=[slice(end - extend, end) for end, extend in zip(ends, extend_lens, strict=True)],
            groups=list(self._groups(page_table, prefix_lens)),
            new_keys=(pages[:, None] * num_heads + torch.arange(num_heads)).flatten(),
            final=torch.tensor(is_final).nonzero().flatten(),
            num_pages=torch.tensor([num_pages_of(n, page_size) for n in lens]),
            num_pages_next=torch.tensor([num_pages_of(n + 1, page_size) for n in lens]),
        )
        return self._plan

    def _groups(self, page_table: torch.Tensor, prefix_lens: list[int]) -> Iterator[list[PrefixPiece]]:
        """Cut the prefixes of a batch into groups of pieces that fit the arena."""
        page_size, capacity = self.memory.geometry.page_size, self.memory.config.arena_pages
        group, used = [], 0
        for request, prefix_len in enumerate(prefix_lens):
            first, num_pages = 0, num_pages_of(prefix_len, page_size)
            while first < num_pages:
                if used == capacity:
                    yield group
                    group, used = [], 0
                count = min(num_pages - first, capacity - used)
                num_tokens = min(prefix_len - first * page_size, count * page_size)
                pages = page_table[request, first : first + count]
                group.append(PrefixPiece(request, pages, used * page_size, num_tokens))
                first, used = first + count, used + count
        if group:
            yield group

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """One layer of an extend batch; the requests' tokens are concatenated.

        Parameters
        ----------
        q : model dtype, ``[num_tokens, num_qo_heads, head_dim]``, post-RoPE
        k, v : model dtype, ``[num_tokens, num_kv_heads, head_dim]``, k post-RoPE
        scale : float, of the logits

        Returns
        -------
        model dtype, ``[num_tokens, num_qo_heads, head_dim]``
        """
        self.memory.host.store(layer, k, v, self._plan.slots)
        self._fill_blocks(layer)
        out = self._attend(layer, q, k, v, scale)
        if len(self._plan.final):
            self._start_windows(layer, q)
        return out

    def _fill_blocks(self, layer: int) -> None:
        """Keep the written pages resident where blocks are to be had without taking one from a running request."""
        blocks, keys = self.memory.blocks, self._plan.new_keys
        if layer not in blocks.dense_layers:
            missing = keys[blocks.lookup(layer, keys) < 0]
            # Stamped as used by the step before: the next decode step may evict them.
            blocks.claim(layer, missing, protect_from=blocks.back_stamp, stamp=blocks.front_stamp)
        kv_indices = blocks.lookup(layer, keys)
        is_resident = kv_indices >= 0
        ops.recall_blocks(self.memory.host.kv, layer, keys[is_resident], kv_indices[is_resident], blocks.kv[layer])

    def _attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Causal attention of each request's queries to its prefix and to the chunk."""
        plan, host_kv, arena = self._plan, self.memory.host.kv[:, layer], self.memory.arena[layer % 2]
        states = [ops.attend_ragged(q[own], k[own], v[own], scale, causal=True) for own in plan.queries]
        for group in plan.groups:
            ops.fill_arena(arena, host_kv, torch.cat([piece.pages for piece in group]))
            for piece in group:
                own = plan.queries[piece.request]
                k_prefix, v_prefix = arena[piece.first_token :][: piece.num_tokens].unbind(1)
                part = ops.attend_ragged(q[own], k_prefix, v_prefix, scale, causal=False)
                states[piece.request] = ops.merge_states(*states[piece.request], *part)
        return torch.cat([out for out, _ in states]).to(q.dtype)

    def _start_windows(self, layer: int, q: torch.Tensor) -> None:
        """Select the first windows with the last prompt token's query."""
        plan, memory, g = self._plan, self.memory, self.memory.geometry
        config, windows, blocks = memory.config, memory.windows, memory.blocks
        rows, page_table = plan.rows[plan.final], plan.page_table[plan.final]
        last_token = torch.tensor([plan.queries[i].stop - 1 for i in plan.final.tolist()])
        last_q = q[last_token].view(-1, g.num_kv_heads, g.group_size, g.head_dim)
        windows.last_q[layer][rows] = last_q
        if layer in blocks.dense_layers:
            return
        window = ops.select_pages(
            ops.score_pages(last_q, memory.host.summary[layer], page_table),
            plan.num_pages_next[plan.final],
            windows.budget_pages[rows],
            config.sink_pages,
            config.recent_pages,
            config.max_budget_pages,
            config.group_pooling,
        )
        windows.start(layer, rows, window)
        keys = window_keys(window, page_table, plan.num_pages[plan.final])
        prefetch_window(memory, layer, keys, protect_from=blocks.back_stamp)
