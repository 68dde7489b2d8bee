"""CORM: a key stays while one of the latest queries gave it its fair share of attention.

Source: "CORM: Cache Optimization with Recent Message for Large Language Model Inference" (arXiv 2404.15949): queries
that are near in the text attend alike, so a key that none of the last w queries gave at least 1 / t of its attention,
over t keys, is dropped for good; the cache has no fixed size.

Here a page is kept or dropped, its fair share is one over the number of pages attended to, and one query head of the
group that gives it is enough. The budget is fixed, so the page goes whose last fair share is the longest ago: pages
that the last w queries want outlive the others whatever w is. Of those that none wanted, the oldest goes.
"""

from __future__ import annotations

import torch

from freekv_kernels import Batch
from sglang_freekv.algorithm.baselines.eviction import EvictionSelector
from sglang_freekv.algorithm.baselines.page_attention import last_positions
from sglang_freekv.memory.layers import Layer


class CORMSelector(EvictionSelector):
    """By the position of the latest query that gave a page its fair share; `state` is that position, -1: none."""

    baseline = "CORM (arXiv 2404.15949), at a fixed budget"
    num_observed = 256
    unseen = -1.0

    def first(self, shares: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self._latest(shares, batch)

    def next(self, state: torch.Tensor, shares: torch.Tensor, batch: Batch) -> torch.Tensor:
        return torch.maximum(state, self._latest(shares, batch))

    def worth(self, layer: Layer, batch: Batch, pages: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        # Steps since, and a fraction for the page, which fp32 keeps apart up to some 16,384 steps: then pages may tie.
        now = last_positions(batch, self.memory.geometry.page_size)[:, None, None]
        return state - now + pages / self.memory.max_pages

    def _latest(self, shares: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Position of the latest of some queries that gave each page its fair share."""
        num_pages = (shares > float("-inf")).sum(-1, keepdim=True)
        is_fair = (shares >= -num_pages.log()).any(3)
        last = last_positions(batch, self.memory.geometry.page_size)[:, None] - torch.arange(shares.shape[2])
        return torch.where(is_fair, last[:, None, :, None], self.unseen).amax(2)
