"""Sliding windows: the latest pages of each running request, the same in every layer of a kind and every KV head."""

from __future__ import annotations

from typing import NamedTuple

import torch

from freekv_kernels import Batch, FlagList
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.layers import LayerKind


def sliding_pages(kind: LayerKind, geometry: Geometry, max_pages: int) -> int:
    """Pages of a request that a layer of this kind reads, at most; whole pages, the first is masked by position."""
    return min(kind.num_sliding_pages(geometry.page_size), max_pages)


def sliding_blocks(
    kind: LayerKind, geometry: Geometry, *, max_pages: int, max_requests: int, num_host_pages: int
) -> int:
    """Device blocks of a layer of this kind. A page is opened before the one that leaves the window may go."""
    pages = sliding_pages(kind, geometry, max_pages) + 1
    return geometry.num_kv_heads * min(max_requests * pages, num_host_pages)


class SlidingWindows(NamedTuple):
    """What the ops read of the layers of one kind, at fixed addresses.

    The pages of a row are those of its latest tokens, listed without a choice; nothing is ever flagged.
    """

    pages: torch.Tensor  # int32 [2, max_requests + 1, num_kv_heads, width], logical pages, -1 padded; both halves alike
    budgets: torch.Tensor  # int64 [max_requests, num_kv_heads], the width
    always: torch.Tensor  # int64 [max_requests, num_kv_heads], more pages than a request has
    flags: FlagList

    @classmethod
    def of(cls, kind: LayerKind, geometry: Geometry, max_requests: int, max_pages: int, device: str) -> SlidingWindows:
        width, num_kv_heads = sliding_pages(kind, geometry, max_pages), geometry.num_kv_heads
        shape = (max_requests, num_kv_heads)
        return cls(
            pages=torch.full((2, max_requests + 1, num_kv_heads, width), -1, dtype=torch.int32, device=device),
            budgets=torch.full(shape, width, device=device),
            always=torch.full(shape, max_pages + 1, device=device),
            flags=FlagList(
                rows=torch.zeros(max_requests * num_kv_heads, dtype=torch.int32, device=device),
                count=torch.zeros(1, dtype=torch.int32, device=device),
                is_flagged=torch.zeros(max_requests * num_kv_heads, dtype=torch.bool, device=device),
            ),
        )

    @property
    def width(self) -> int:
        return self.pages.shape[3]

    def slide(self, batch: Batch) -> None:
        """Write the windows of a batch; nothing is decided on the host."""
        column = torch.arange(self.width, device=self.pages.device)
        page = (batch.num_pages - self.width).clamp(min=0)[:, None] + column
        page = page.where(page < batch.num_pages[:, None], -1).int()
        self.pages[:, batch.rows] = page[:, None].expand(-1, self.pages.shape[2], -1)

    def in_step(self, batch: Batch) -> Batch:
        """The batch as a decode step fetches its windows: the next step reads them again, but for the oldest page."""
        return batch._replace(budget_pages=self.always[: len(batch.rows)])

    def at_start(self, batch: Batch) -> Batch:
        """The batch as the first windows are fetched, of requests whose prompts are complete."""
        return batch._replace(budget_pages=self.budgets[: len(batch.rows)])

    def flags_of(self, batch: Batch) -> FlagList:
        num_rows = batch.budget_pages.numel()
        return FlagList(self.flags.rows[:num_rows], self.flags.count, self.flags.is_flagged[:num_rows])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.pages, self.budgets, self.always, *self.flags))
