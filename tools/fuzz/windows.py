"""Windows and their blocks: of the step that was read, and of the step to come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from freekv_kernels import Count, Half
from sglang_freekv.algorithm.audit import audit_windows
from sglang_freekv.config import BASELINES
from sglang_freekv.testing.reference_decoder import ReferenceRequest, explain_difference
from sglang_freekv.testing.reference_scores import Rule
from tools.fuzz.batch import Batch
from tools.fuzz.setups import PAGE_SIZE

if TYPE_CHECKING:
    from tools.fuzz.scheduler import Life, Scheduler

# Steps between two that are held against the slow reference as well.
_REFERENCE_EVERY = 8
_TOLERANCE = 1e-4  # of a score


class WindowChecks:
    """What a decode step read, and that the blocks of the next step's windows stay where they are until then."""

    def __init__(self, scheduler: Scheduler) -> None:
        g, c = scheduler.setup.geometry, scheduler.setup.config
        self._scheduler, self._memory = scheduler, scheduler.memory
        self._table = self._memory.blocks.tables.table.numpy()  # [num_layers, num_pages, num_kv_heads]
        self._windows = self._memory.windows.pages.numpy()
        self._layers = [layer for layer in range(g.num_layers) if layer not in c.dense_layers]
        self._next: dict[Life, tuple[np.ndarray, ...]] = {}  # layer, head, logical and host page of resident entries
        self._rule = Rule.of(self._memory)
        config = self._memory.config  # what looks at windows before is not known here
        looks_back = config.candidates > 0 or config.score_interval > 1
        self._has_reference = config.selector not in BASELINES and not looks_back

    def after_batch(self, batch: Batch) -> None:
        """A batch has run."""
        assert self._memory.counters[Count.ABSENT_PAGES] == 0, "a window had a page without a block"
        if batch.mode.is_decode():
            self._next.clear()
            audit_windows(self._scheduler.backend.decode)
            is_compared = self._has_reference and self._memory.counters.steps % _REFERENCE_EVERY == 0
            for index, member in enumerate(batch.members):
                self._check_front(batch, index, is_compared)
                self._note(member.life, batch.pages[index])
        else:
            self.check()
            for index, member in enumerate(batch.members):
                if member.is_answered:
                    self._note(member.life, batch.pages[index])

    def _check_front(self, batch: Batch, index: int, is_compared: bool) -> None:
        """Its pages are those of the request, and have blocks."""
        member, pages = batch.members[index], batch.pages[index]
        heads = np.arange(self._rule.num_kv_heads)[:, None]
        for layer in self._layers:
            window = batch.front_windows(layer, index)
            assert (window[:, 0] >= 0).all() and (window < len(pages)).all(), f"layer {layer}: window {window.tolist()}"
            sizes, most = (window >= 0).sum(1), min(len(pages), member.life.budget_pages)
            assert sizes.sum() <= len(sizes) * most, f"layer {layer}: windows of {sizes} pages, of {most} each"
            assert self._rule.mass or (sizes == most).all(), (
                f"layer {layer}: windows of {sizes} pages instead of {most}"
            )
            is_resident = self._table[layer, pages[window], heads] >= 0
            assert is_resident.all(), f"layer {layer}: a page of the window has no block"
            if is_compared:
                self._compare(layer, member.life, member.last, [own[own >= 0].tolist() for own in window])

    def _compare(self, layer: int, life: Life, length: int, windows: list[list[int]]) -> None:
        """The window is what the rule says of the request's own keys."""
        values = self._scheduler.values
        reference = ReferenceRequest(self._rule, life.budget_pages)
        reference.keys[layer] = torch.from_numpy(values.kv(life.text.hashes[:length])[:, layer, :, 0]).double()
        queries = torch.from_numpy(values.queries(life.text, length - 2, length)[:, layer]).flatten(1, 2).double()
        previous, latest = queries
        for head, window in enumerate(windows):
            expected, scores, *_ = reference.front_window(layer, head, latest, previous)
            difference = explain_difference(window, expected, scores, _TOLERANCE)
            assert not difference, f"layer {layer}, head {head}: {difference}"

    def _note(self, life: Life, pages: np.ndarray) -> None:
        """Which entries of the next step's windows have a block now, unless the request left while the batch ran."""
        if life not in self._scheduler.running:
            return
        (half,) = Half.BACK.indices(int(self._memory.blocks.step))
        window = self._windows[half, self._layers, life.req.req_pool_idx]  # [layers, num_kv_heads, width]
        layer, head, entry = ((window >= 0) & (window < len(pages))).nonzero()
        logical, layer = window[layer, head, entry], np.array(self._layers)[layer]
        page = pages[logical]
        is_resident = self._table[layer, page, head] >= 0
        self._next[life] = tuple(x[is_resident] for x in (layer, head, logical, page))

    def check(self) -> None:
        """Nothing that the next step reads has lost its block, unless its request left or got another page for it."""
        for life in list(self._next):
            if life not in self._scheduler.running:
                del self._next[life]
                continue
            layer, head, logical, page = self._next[life]
            row = self._scheduler.rows.req_to_token.numpy()[life.req.req_pool_idx]
            is_same = row[logical * PAGE_SIZE] // PAGE_SIZE == page
            is_lost = is_same & (self._table[layer, page, head] < 0)
            assert not is_lost.any(), f"pages {page[is_lost].tolist()} of the next step's windows lost their blocks"
