"""Layers: which kinds there are, and what the ops read and write in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from freekv_kernels import BlockTables, MissList, PageStore
from sglang_freekv.config import FreeKVConfig


@dataclass(frozen=True)
class LayerKind:
    """What a layer attends to, and what that asks of the memory."""

    name: str
    is_cached: bool  # its blocks come and go; if not, each pair has one, at the block number of the pair: none misses
    selects: bool  # its windows are chosen by scores; if not, it needs neither index nor queries of the step before


WINDOWED = LayerKind("windowed", is_cached=True, selects=True)
DENSE = LayerKind("dense", is_cached=False, selects=False)  # attends to every page


def kinds_of(config: FreeKVConfig, num_layers: int) -> tuple[LayerKind, ...]:
    """The kind of each layer."""
    return tuple(DENSE if number in config.dense_layers else WINDOWED for number in range(num_layers))


def num_cached_layers(config: FreeKVConfig, num_layers: int) -> int:
    """Layers whose blocks come and go."""
    return sum(kind.is_cached for kind in kinds_of(config, num_layers))


class Layer(NamedTuple):
    """One layer: views of the tensors of `KVMemory`."""

    number: int
    kind: LayerKind
    store: PageStore
    blocks: BlockTables  # of this layer alone: leading dimension 1
    windows: torch.Tensor  # int32 [2, max_requests + 1, num_kv_heads, width]
    row_budgets: torch.Tensor | None  # int64 [max_requests + 1, num_kv_heads], of the last written; None: the request's
    last_q: torch.Tensor  # [max_requests + 1, num_kv_heads, group_size, head_dim]
    front: MissList  # missing pages of the windows that this step reads
    back: MissList  # of those that the next step reads
