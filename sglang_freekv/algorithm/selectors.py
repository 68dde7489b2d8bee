"""The selectors that there are."""

from __future__ import annotations

import torch

from freekv_kernels import Batch, FlagList, Half
from sglang_freekv.algorithm.baselines.arkvale import ArkValeSelector
from sglang_freekv.algorithm.baselines.corm import CORMSelector
from sglang_freekv.algorithm.baselines.one_time import OneTimeSelector
from sglang_freekv.algorithm.baselines.r_kv import RKVSelector
from sglang_freekv.algorithm.baselines.streaming_llm import StreamingLLMSelector
from sglang_freekv.algorithm.selector import Scores, Selector
from sglang_freekv.memory.layers import Layer


class MinMaxSelector(Selector):
    """By the bound on a page's logits that the minimum and maximum of its keys give (Quest; the paper's)."""

    def score(self, layer: Layer, batch: Batch, half: Half, scale: float, flags: FlagList | None = None) -> Scores:
        return Scores(self._score(layer, batch, half, flags))

    def _score(
        self,
        layer: Layer,
        batch: Batch,
        half: Half,
        flags: FlagList | None,
        codes: torch.Tensor | None = None,
        scale: float | None = None,
        pages: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See the op `score_pages`."""
        memory = self.memory
        workspace = memory.tables.scores(half, len(batch.rows) * memory.geometry.num_kv_heads)
        if pages is not None and workspace is not None:
            workspace = workspace[:, :, : pages.shape[1]]
        summary = memory.index.summary(layer.number)
        return memory.ops.score_pages(layer.last_q, summary, batch, half, flags, workspace, codes, scale, pages)


class CodesSelector(MinMaxSelector):
    """By the largest logit of a page's tokens, as their keys in a few bits give it."""

    def score(self, layer: Layer, batch: Batch, half: Half, scale: float, flags: FlagList | None = None) -> Scores:
        return Scores(self._score(layer, batch, half, flags, self.memory.index.codes_of(layer.number)))


class MassSelector(MinMaxSelector):
    """By a page's share of the attention, as its keys in a few bits give it: what all of its tokens get together."""

    pools_group = True

    def score(self, layer: Layer, batch: Batch, half: Half, scale: float, flags: FlagList | None = None) -> Scores:
        masses = self._masses(layer, batch, half, scale, flags)
        about = (layer.last_q, layer.store, batch, half, scale, flags, masses.pages)
        self.memory.ops.share_pages(masses.values, *about)
        return Scores(masses.values[:, :1], masses.pages)

    def _masses(self, layer: Layer, batch: Batch, half: Half, scale: float, flags: FlagList | None = None) -> Scores:
        codes, pages = self.memory.index.codes_of(layer.number), self._candidates(layer, batch, half, scale)
        return Scores(self._score(layer, batch, half, flags, codes, scale, pages), pages)

    def _candidates(self, layer: Layer, batch: Batch, half: Half, scale: float) -> torch.Tensor | None:
        """List the pages of the groups whose bounds promise most; None: every page is scored."""
        memory, sizes = self.memory, self.memory.sizes
        pages = memory.tables.list_of_pages(half, batch)
        if pages is not None:
            rule = (memory.config.candidates, sizes.sink, sizes.recent)
            written = (layer.windows, pages, memory.tables.scores(half, len(pages)))
            summary = memory.index.summary(layer.number)
            memory.ops.list_candidates(layer.last_q, summary, batch, half, scale, *rule, *written)
        return pages

    def correct_windows(
        self,
        layer: Layer,
        batch: Batch,
        front_budgets: torch.Tensor,
        scale: float,
        gate: float,
        flags: FlagList,
        due: FlagList | None,
    ) -> Scores:
        """Select again where the front window would lose more of the attention than `gate`, then for the next step.

        Parameters
        ----------
        batch : Batch
            With the budgets of the next step.
        front_budgets : int64, ``[batch_size, num_kv_heads]``, device, pages
            That the front windows were selected with.
        scale : float, of the logits
        flags : FlagList
            Written.
        due : FlagList or None
            The rows that are scored; others keep their windows. None: all that are over their next budget.

        Returns
        -------
        Scores
            As those of `score`, of the rows that are scored.
        """
        memory, sizes, masses = self.memory, self.memory.sizes, self._masses(layer, batch, Half.BACK, scale, due)
        rule = (scale, gate, sizes.sink, sizes.recent, layer.windows, flags, memory.counters.values)
        own = (masses.values, layer.last_q, layer.store, batch, front_budgets)
        pace = () if due is None else (due, layer.pace, memory.config.score_interval)
        memory.ops.correct_windows(*own, *rule, memory.config.bonus, masses.pages, *pace)
        return Scores(masses.values[:, :1], masses.pages)

    def apportion(self, layer: Layer, batch: Batch, half: Half, shares: Scores, budget_pages: torch.Tensor) -> Batch:
        """The batch with budgets that follow the rows' attention, for windows that are written next.

        Parameters
        ----------
        batch : Batch
            With the budgets of the requests.
        shares : of `correct_windows`, or `score`
        budget_pages : int64, ``[batch_size, num_kv_heads]``, device
            Where they are written.
        """
        memory, sizes = self.memory, self.memory.sizes
        rule = (memory.budgets.masses, sizes.sink, sizes.recent, sizes.times)
        written = (budget_pages, layer.row_budgets)
        memory.ops.apportion_pages(shares.values, batch, half, *rule, *written, shares.pages)
        return batch._replace(budget_pages=budget_pages)


# Name (`--freekv-selector`) -> selector; what it reads of a page: `page_indexes.INDEXES`.
SELECTORS: dict[str, type[Selector]] = {
    "mass": MassSelector,
    "codes": CodesSelector,
    "min-max": MinMaxSelector,
    "paper": MinMaxSelector,  # its settings differ
    "streaming-llm": StreamingLLMSelector,
    "one-time": OneTimeSelector,
    "r-kv": RKVSelector,
    "corm": CORMSelector,
    "arkvale": ArkValeSelector,
}
