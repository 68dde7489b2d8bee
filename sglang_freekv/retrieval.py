"""Decode: attend to the window, correct the heads whose query moved, retrieve for the next step.

Per layer:  append -> correct flagged rows -> make the front resident -> attend -> select and recall the back
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import freekv_kernels as ops
from sglang_freekv.kv_memory import KVMemory
from sglang_freekv.page_table import WindowKeys, every_key, snapshot_page_table, window_keys


@dataclass
class DecodePlan:
    """One decode step of a batch, the same for all layers; lengths include the new token."""

    rows: torch.Tensor  # int64 [batch_size], rows of the request table
    slots: torch.Tensor  # int64 [batch_size], of the new tokens
    seq_lens: list[int]
    window_lens: list[int]  # tokens in each front window
    page_table: torch.Tensor  # int64 [batch_size, max_pages]
    num_pages: torch.Tensor  # int64 [batch_size]
    num_pages_next: torch.Tensor  # int64 [batch_size], with one token more
    is_over: torch.Tensor  # bool [batch_size], the request exceeds its budget in this step
    num_over: int  # such requests
    over_next: torch.Tensor  # int64, batch indices of the requests that do in the next step
    within_next: torch.Tensor  # int64, the others
    every_page: WindowKeys  # all pages of each request: what dense layers and requests within the budget read


class Retrieval:
    """The decode side of the engine, for one rank. `plan` once per step, then `run` for each layer in order."""

    def __init__(self, memory: KVMemory) -> None:
        self.memory = memory
        self._plan: DecodePlan | None = None

    @property
    def last_plan(self) -> DecodePlan | None:
        return self._plan

    def plan(self, rows: torch.Tensor, req_to_token: torch.Tensor, seq_lens: list[int]) -> DecodePlan:
        """Start a decode step.

        Parameters
        ----------
        rows : int64, ``[batch_size]``
            `req_pool_idx` of every running request.
        req_to_token : int32, ``[max_requests + 1, max_context]``
            Token slots, those of the new tokens included.
        seq_lens : list of int
            With the new token.
        """
        memory, page_size = self.memory, self.memory.geometry.page_size
        rows, lens = rows.long(), torch.tensor(seq_lens)
        slots = req_to_token[rows, lens - 1].long()
        page_table = snapshot_page_table(rows, req_to_token, max(seq_lens), page_size)
        num_pages, num_pages_next = (lens - 1) // page_size + 1, lens // page_size + 1
        budget = memory.windows.budget_pages[rows]
        is_over, is_over_next = num_pages > budget, num_pages_next > budget

        memory.begin_write(slots)
        opens_page = slots % page_size == 0
        if opens_page.any():
            memory.blocks.open_pages(slots[opens_page] // page_size)
            within = opens_page & ~is_over
            memory.windows.open_page(rows[within], num_pages[within] - 1)
        memory.begin_step()
        memory.counters.decoded_tokens += len(seq_lens)

        window_pages = torch.minimum(num_pages, budget)
        self._plan = DecodePlan(
            rows=rows,
            slots=slots,
            seq_lens=seq_lens,
            window_lens=(lens - (num_pages - window_pages) * page_size).tolist(),
            page_table=page_table,
            num_pages=num_pages,
            num_pages_next=num_pages_next,
            is_over=is_over,
            num_over=int(is_over.sum()),
            over_next=is_over_next.nonzero().flatten(),
            within_next=(~is_over_next).nonzero().flatten(),
            every_page=every_key(page_table, num_pages, memory.geometry.num_kv_heads),
        )
        return self._plan

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """One layer of a decode step.

        Parameters
        ----------
        q : model dtype, ``[batch_size, num_qo_heads, head_dim]``, post-RoPE
        k, v : model dtype, ``[batch_size, num_kv_heads, head_dim]``, k post-RoPE
        scale : float, of the logits

        Returns
        -------
        model dtype, ``[batch_size, num_qo_heads, head_dim]``
        """
        plan, memory, g = self._plan, self.memory, self.memory.geometry
        q = q.view(-1, g.num_kv_heads, g.group_size, g.head_dim)
        blocks = memory.blocks
        host_kv, summary = memory.host.kv[:, layer], memory.host.summary[layer]
        ops.append_tokens(k, v, plan.slots, host_kv, summary, blocks.kv[layer], blocks.table[layer])
        if layer in blocks.dense_layers:
            kv_indices, kv_lens = blocks.lookup(layer, plan.every_page.keys), plan.seq_lens
            return ops.attend_window(q, blocks.kv[layer], kv_indices, kv_lens, scale).flatten(1, 2)

        scores, is_flagged = None, None
        if len(plan.over_next):
            scores = self.score(layer, q)
            is_flagged = self._correct(layer, q, scores)
        kv_indices = self._make_front_resident(layer, is_flagged)
        out = ops.attend_window(q, blocks.kv[layer], kv_indices, plan.window_lens, scale)
        if scores is not None:
            self._retrieve(layer, scores)
            # Compared with in the next step, which a request within its budget need not do.
            memory.windows.last_q[layer][plan.rows] = q
        return out.flatten(1, 2)

    def score(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Page scores of the requests in `over_next`; q is ``[batch_size, num_kv_heads, group_size, head_dim]``."""
        over = self._plan.over_next
        return ops.score_pages(q[over], self.memory.host.summary[layer], self._plan.page_table[over])

    def select(self, scores: torch.Tensor, num_pages: torch.Tensor) -> torch.Tensor:
        """Windows of the requests in `over_next`, at a length of `num_pages` (of the batch) pages each."""
        config, budget, over = self.memory.config, self.memory.windows.budget_pages, self._plan.over_next
        return ops.select_pages(
            scores,
            num_pages[over],
            budget[self._plan.rows[over]],
            config.sink_pages,
            config.recent_pages,
            config.max_budget_pages,
            config.group_pooling,
        )

    def _correct(self, layer: int, q: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Select again, with this step's query, for the rows whose query moved; returns them, bool ``[B, H]``."""
        plan, windows, counters = self._plan, self.memory.windows, self.memory.counters
        similarity = ops.compare_queries(q, windows.last_q[layer][plan.rows])
        is_flagged = plan.is_over[:, None] & (similarity < self.memory.config.tau)
        counters.rows += plan.num_over * is_flagged.shape[1]
        counters.flagged_rows += int(is_flagged.sum())
        index, head = is_flagged[plan.over_next].nonzero(as_tuple=True)
        if len(index):
            window = self.select(scores, plan.num_pages)
            windows.front(layer)[plan.rows[plan.over_next][index], head] = window[index, head]
        return is_flagged

    def _make_front_resident(self, layer: int, is_flagged: torch.Tensor | None) -> torch.Tensor:
        """Blocks (int64 ``[B, H, num_entries]``) of the front windows, after fetching what has none."""
        plan, blocks, counters = self._plan, self.memory.blocks, self.memory.counters
        keys, is_valid = plan.every_page
        if plan.num_over:
            front = self.memory.windows.front(layer)[plan.rows]
            keys, is_valid = window_keys(front, plan.page_table, plan.num_pages)
        kv_indices = blocks.lookup(layer, keys)
        is_missing = is_valid & (kv_indices < 0)
        if is_flagged is not None:
            counters.hits += int(((kv_indices >= 0) & is_flagged[..., None]).sum())
        # Before any claim, so that no claim of this step takes a block that this step reads.
        blocks.touch(layer, kv_indices, blocks.front_stamp)
        if is_missing.any():
            stamp = blocks.front_stamp
            if is_flagged is not None:
                corrected = keys[is_missing & is_flagged[..., None]]
                counters.misses += blocks.fetch(layer, corrected, stamp, stamp)
            counters.demand_misses += blocks.fetch(layer, keys[is_missing], stamp, stamp)
            kv_indices = blocks.lookup(layer, keys)
            counters.absent_pages += int((is_valid & (kv_indices < 0)).sum())
        # Requests within their budget have no back window: they read the same blocks again.
        if len(plan.within_next):
            blocks.touch(layer, kv_indices[plan.within_next], blocks.back_stamp)
        return kv_indices

    def _retrieve(self, layer: int, scores: torch.Tensor) -> None:
        """Speculative retrieval: what the next step will read, selected with this step's query."""
        plan = self._plan
        rows, num_pages = plan.rows[plan.over_next], plan.num_pages[plan.over_next]
        window = self.select(scores, plan.num_pages_next)
        self.memory.windows.back(layer)[rows] = window
        keys = window_keys(window, plan.page_table[plan.over_next], num_pages)
        prefetch_window(self.memory, layer, keys, protect_from=self.memory.blocks.front_stamp)


def prefetch_window(memory: KVMemory, layer: int, keys: WindowKeys, protect_from: int) -> None:
    """Make a window that the next decode step will read resident."""
    blocks, counters = memory.blocks, memory.counters
    kv_indices = blocks.lookup(layer, keys.keys)
    blocks.touch(layer, kv_indices, blocks.back_stamp)
    missing = keys.keys[keys.is_valid & (kv_indices < 0)]
    counters.hits += int(keys.is_valid.sum()) - len(missing)
    if len(missing):
        counters.misses += blocks.fetch(layer, missing, protect_from, blocks.back_stamp)
