"""Selectors: how the pages of a window are chosen. One is a way to score pages; the rest is common to all."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from freekv_kernels import Batch, FlagList, Half
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import Layer


class Selector(ABC):
    """Chooses the pages of rows over their budget by the latest queries; a page's index is all it reads of a page.

    Nothing is decided on the host, so a CUDA graph can hold its calls.
    """

    def __init__(self, memory: KVMemory) -> None:
        self.memory = memory

    @abstractmethod
    def score(self, layer: Layer, batch: Batch, half: Half, flags: FlagList | None = None) -> torch.Tensor:
        """Score every page for every query head, in the rows over their budget; only in flagged rows if given.

        Returns
        -------
        float32, ``[batch_size * num_kv_heads, group_size, max_pages]``, device
            Undefined in other rows, and past a request's pages.
        """

    def write_windows(
        self,
        layer: Layer,
        batch: Batch,
        half: Half,
        scale: float,
        flags: FlagList | None = None,
        scores: torch.Tensor | None = None,
    ) -> None:
        """Select the windows of rows over their budget; only of flagged rows if given.

        Parameters
        ----------
        layer : Layer
            Its windows are written: sink, the pages that the group scores highest, recent.
        batch : Batch
        half : Half
        scale : float, of the logits
        flags : FlagList, optional
        scores : optional
            Of `score`, where they are known already.
        """
        memory = self.memory
        if scores is None:
            scores = self.score(layer, batch, half, flags)
        rule = (memory.sizes.sink, memory.sizes.recent, memory.config.group_pooling)
        memory.ops.select_pages(scores, batch, half, *rule, layer.windows, flags, scale)
