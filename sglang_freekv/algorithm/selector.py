"""Selectors: how the pages of a window are chosen. One is a way to score pages; the rest is common to all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch

from freekv_kernels import Batch, FlagList, Half
from sglang_freekv.memory.layers import Layer

if TYPE_CHECKING:
    from sglang_freekv.memory.kv_memory import KVMemory


class Scores(NamedTuple):
    """How pages are scored, in the rows over their budget, or only in flagged rows; undefined in others."""

    values: torch.Tensor  # float32 [batch_size * num_kv_heads, group_size or 1, columns], undefined past the pages
    pages: torch.Tensor | None = (
        None  # int32 [batch_size * num_kv_heads, columns]: see `select_pages`; None: every page
    )


class Selector(ABC):
    """Chooses the pages of rows over their budget by the latest queries; a page's index is all it reads of a page.

    Nothing is decided on the host, so a CUDA graph can hold its calls.

    What a selector keeps of a request lies in tensors by row of the request table: `start` writes it anew, `observe`
    goes on with it. `score` changes nothing, as a step may ask once or twice, and an audit once more.

    Attributes
    ----------
    baseline : str or None
        Whose method it is, where it is here to be compared with: a citation.
    runs_on_gpu : bool
        Whether it is made of ops that have a kernel; if not, start-up refuses it on a GPU.
    pools_group : bool
        Whether its scores are those of a query group, in logarithms: one for each page instead of one for each head.
    num_observed : int
        Last queries of a prompt that `start` is shown; 0: it is not called.
    """

    baseline: str | None = None
    runs_on_gpu = True
    pools_group = False
    num_observed = 0

    def __init__(self, memory: KVMemory) -> None:
        self.memory = memory

    def start(  # noqa: B027  most keep nothing of a request
        self, layer: Layer, batch: Batch, queries: torch.Tensor, num_known: torch.Tensor, scale: float
    ) -> None:
        """Prompts have ended: drop what was kept of their rows' former requests. `write_windows` (BOTH) follows.

        Parameters
        ----------
        batch : Batch
            At the requests' first decode step; `slots` are those of the prompts' last tokens.
        queries : model dtype, ``[batch_size, num_observed, num_kv_heads, group_size, head_dim]``, device
            Of the prompts' last tokens, the last one first.
        num_known : int64, ``[batch_size]``, device
            How many of them are known, at least 1: those of the prompt's last chunk. A shorter chunk has fewer, and the
            tokens of a prefix hit have none.
        scale : float, of the logits
        """

    def observe(self, layer: Layer, batch: Batch, scale: float) -> None:  # noqa: B027
        """A decode step's tokens are written and its queries are in `layer.last_q`; once per step and layer, first."""

    @abstractmethod
    def score(self, layer: Layer, batch: Batch, half: Half, scale: float, flags: FlagList | None = None) -> Scores:
        """Score pages for every query head, or for the group, in rows over their budget; only in flagged rows if given.

        Parameters
        ----------
        scale : float, of the logits
        """

    def write_windows(
        self,
        layer: Layer,
        batch: Batch,
        half: Half,
        scale: float,
        flags: FlagList | None = None,
        scores: Scores | None = None,
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
            scores = self.score(layer, batch, half, scale, flags)
        config, sizes = memory.config, memory.sizes
        rule = (sizes.sink, sizes.recent, "mean" if self.pools_group else config.pooling)
        written = (layer.windows, flags)
        memory.ops.select_pages(scores.values, batch, half, *rule, *written, scale, config.bonus, scores.pages)
