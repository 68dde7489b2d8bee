"""Layers: which kinds there are, and what the ops read and write in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from freekv_kernels import BlockTables, MissList, PageStore
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry, num_pages_of


@dataclass(frozen=True)
class LayerKind:
    """What a layer attends to, and what that asks of the memory."""

    name: str
    is_cached: bool  # its blocks come and go; if not, each pair has one, at the block number of the pair: none misses
    selects: bool  # its windows are chosen by scores; if not, it needs neither index nor queries of the step before
    sliding_window: int | None = None  # tokens that a query sees, its own included; None: all

    def num_sliding_pages(self, page_size: int) -> int:
        """Most pages that a sliding window lies in: the tokens before the query's end inside a page."""
        return num_pages_of(self.sliding_window - 1, page_size) + 1


WINDOWED = LayerKind("windowed", is_cached=True, selects=True)
DENSE = LayerKind("dense", is_cached=False, selects=False)  # attends to every page


def sliding(window: int) -> LayerKind:
    """Attends to the latest `window` tokens, and to no others: nothing is selected."""
    return LayerKind("sliding", is_cached=True, selects=False, sliding_window=window)


def kinds_of(config: FreeKVConfig, geometry: Geometry) -> tuple[LayerKind, ...]:
    """The kind of each layer. A sliding window is the model's, and comes before what the user asks for."""
    windows = geometry.sliding_windows or (None,) * geometry.num_layers
    asked = [DENSE if number in config.dense_layers else WINDOWED for number in range(geometry.num_layers)]
    return tuple(kind if window is None else sliding(window) for kind, window in zip(asked, windows, strict=True))


def num_windowed_layers(config: FreeKVConfig, geometry: Geometry) -> int:
    """Layers whose windows are chosen by scores."""
    return sum(kind.selects for kind in kinds_of(config, geometry))


def sliding_kinds(geometry: Geometry) -> list[LayerKind]:
    """The kinds of the layers with a sliding window, each once."""
    return [sliding(window) for window in dict.fromkeys(geometry.sliding_windows) if window is not None]


def arena_tokens(config: FreeKVConfig, geometry: Geometry) -> int:
    """Tokens of each half of the prefill arena: what is asked for, and at least what a sliding window reads at once."""
    pages = [kind.num_sliding_pages(geometry.page_size) for kind in sliding_kinds(geometry)]
    return max([config.arena_tokens, *(n * geometry.page_size for n in pages)])


class Layer(NamedTuple):
    """One layer: views of the tensors of `KVMemory`."""

    number: int
    kind: LayerKind
    store: PageStore
    blocks: BlockTables  # of this layer alone: leading dimension 1
    windows: torch.Tensor  # int32 [2, max_requests + 1, num_kv_heads, width]
    row_budgets: torch.Tensor | None  # int64 [max_requests + 1, num_kv_heads], of the last written; None: the request's
    last_q: torch.Tensor | None  # [max_requests + 1, num_kv_heads, group_size, head_dim]; None where a window slides
    pace: torch.Tensor | None  # int32 [max_requests + 1, num_kv_heads, 2]; None where a window slides
    front: MissList  # missing pages of the windows that this step reads
    back: MissList  # of those that the next step reads
