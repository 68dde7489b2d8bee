"""Eviction: what has left a request's window is gone for it, though its host store has it still."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch

from freekv_kernels import Batch, FlagList, Half
from sglang_freekv.algorithm.baselines.page_attention import page_shares
from sglang_freekv.algorithm.selector import Scores, Selector
from sglang_freekv.memory.layers import Layer

if TYPE_CHECKING:
    from sglang_freekv.memory.kv_memory import KVMemory


class EvictionSelector(Selector):
    """Of the pages in a request's window, and of the one that leaves its recent pages, the worst goes.

    So something happens in the steps whose next one opens a page; in the others, and where a flagged row selects again,
    a window is chosen from as many pages as it has. A first window is chosen from all pages of the prompt.

    Attributes
    ----------
    state : float32, ``[num_layers, max_requests + 1, num_kv_heads, max_pages + 1]``
        What `start` and `observe` remember of each page; the last column takes what is of no page.
    unseen : float
        State of a page that no query has seen.
    """

    runs_on_gpu = False
    unseen = 0.0

    def __init__(self, memory: KVMemory) -> None:
        super().__init__(memory)
        g = memory.geometry
        self.state = torch.zeros(g.num_layers, memory.max_requests + 1, g.num_kv_heads, memory.max_pages + 1)

    @abstractmethod
    def first(self, shares: torch.Tensor, batch: Batch) -> torch.Tensor:
        """State of a request's pages after its prompt.

        Parameters
        ----------
        shares : float32, ``[1, num_kv_heads, n, group_size, num_pages]``
            See `page_shares`: of the prompt's last n queries, the last one first.
        batch : Batch
            Of this request alone.

        Returns
        -------
        float32, ``[1, num_kv_heads, num_pages]``
        """

    @abstractmethod
    def next(self, state: torch.Tensor, shares: torch.Tensor, batch: Batch) -> torch.Tensor:
        """State of the pages in the windows after a step.

        Parameters
        ----------
        state : float32, ``[batch_size, num_kv_heads, width]``
            Before it.
        shares : float32, ``[batch_size, num_kv_heads, 1, group_size, width]``
            See `page_shares`: of the step's query.
        """

    @abstractmethod
    def worth(self, layer: Layer, batch: Batch, pages: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """What each page is worth; the least is evicted.

        Parameters
        ----------
        pages : int64, ``[batch_size, num_kv_heads, width]``
            Ascending; -1: no page.
        state : float32, the same shape

        Returns
        -------
        float32, the same shape
        """

    def start(self, layer: Layer, batch: Batch, queries: torch.Tensor, num_known: torch.Tensor, scale: float) -> None:
        for i, row in enumerate(batch.rows.tolist()):  # one after the other, to bound the memory
            one = batch.one(i)
            pages = self._candidates(layer, one, Half.BOTH)
            shares = page_shares(layer, one, pages, queries[i : i + 1, : int(num_known[i])], scale)
            state = self.state[layer.number, row].fill_(self.unseen)
            state[:, : pages.shape[-1]] = self.first(shares, one)[0]

    def observe(self, layer: Layer, batch: Batch, scale: float) -> None:
        pages = self._candidates(layer, batch, Half.FRONT)
        shares = page_shares(layer, batch, pages, layer.last_q[batch.rows][:, None], scale)
        state, column = self.state[layer.number, batch.rows], self._columns(pages)
        state.scatter_(-1, column, self.next(state.gather(-1, column), shares, batch))
        self.state[layer.number, batch.rows] = state

    def score(self, layer: Layer, batch: Batch, half: Half, scale: float, flags: FlagList | None = None) -> Scores:
        pages = self._candidates(layer, batch, half)
        state, column = self.state[layer.number, batch.rows], self._columns(pages)
        worth = torch.zeros(pages.shape)
        if half == Half.BOTH or (batch.num_pages_next > batch.num_pages).any():
            worth = self.worth(layer, batch, pages, state.gather(-1, column))
        scores = torch.full_like(state, float("-inf")).scatter_(-1, column, worth)
        scores = scores[..., : batch.page_table.shape[1]].flatten(0, 1)
        return Scores(scores[:, None].expand(-1, self.memory.geometry.group_size, -1))

    def _candidates(self, layer: Layer, batch: Batch, half: Half) -> torch.Tensor:
        """Pages of the present windows, of which there are none yet before a first window: then every page."""
        if half == Half.BOTH:
            page = torch.arange(batch.page_table.shape[1])
            pages = torch.where(page < batch.num_pages[:, None], page, -1)
            return pages[:, None].expand(-1, layer.windows.shape[2], -1)
        (front,) = Half.FRONT.indices(int(batch.step))
        return layer.windows[front, batch.rows].long()

    def _columns(self, pages: torch.Tensor) -> torch.Tensor:
        return torch.where(pages >= 0, pages, self.memory.max_pages)
