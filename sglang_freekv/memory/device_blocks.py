"""Device blocks: a cache of (page, head) pairs over the host store."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import torch

from freekv_kernels import BlockTables, Claim, Ops, PairList
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.layers import LayerKind

# Stamps are int32, two per step; long before they end, all of them become old.
_LAST_STEP = 1 << 29


class DeviceBlocks:
    """Blocks of K and V that attention reads. A block is never the only copy of a token, so evicting is forgetting.

    What may be evicted follows from stamps. Step t stamps the blocks of its front windows with 2t, and those of the
    back windows, which step t + 1 will read, with 2t + 1. Inside the step, blocks stamped 2t or later stay; between
    steps (prefill, new pages), blocks stamped 2t + 1. So ``2 * width * num_kv_heads`` blocks per request suffice.

    A layer whose kind is not cached has a block for every pair, at the block number of the pair: it never misses. One
    with a sliding window stamps what it reads with 2t + 1, as the next step reads it again, and needs one block more
    than that for each head of a request.

    Parameters
    ----------
    num_blocks : int
        Of each cached layer, but for those of `num_sliding`.
    num_sliding : mapping of LayerKind to int, optional
        Blocks of each layer of these kinds.
    counters : int64, ``[len(Count)]``, device
        Advanced by what is claimed between steps.

    Attributes
    ----------
    kv : list over layers of model dtype ``[num_blocks, 2, page_size, head_dim]``, device
    tables : BlockTables
        Of all layers; where a layer is not cached only `table` is used.
    step : int64, ``[1]``, device
        Number of the decode step.
    """

    def __init__(
        self,
        geometry: Geometry,
        ops: Ops,
        *,
        num_host_pages: int,
        num_blocks: int,
        kinds: tuple[LayerKind, ...],
        num_sliding: Mapping[LayerKind, int] | None = None,
        counters: torch.Tensor,
        device: str,
    ) -> None:
        g, num_sliding = geometry, num_sliding or {}
        self.geometry, self._ops, self._counters = g, ops, counters
        self._num_pairs = num_host_pages * g.num_kv_heads
        self._cached = [number for number, kind in enumerate(kinds) if kind.is_cached]
        self.num_blocks = [num_sliding.get(k, num_blocks) if k.is_cached else self._num_pairs for k in kinds]
        self.kv = [torch.empty((n, 2, g.page_size, g.head_dim), dtype=g.dtype, device=device) for n in self.num_blocks]
        for kv in self.kv:
            kv[:1].zero_()  # padding reads a token of block 0: numbers, as NaN could lead a router of experts astray
        num_cached = [self.num_blocks[number] for number in self._cached]
        widest = max([num_blocks, *num_cached])  # of a layer with fewer, the first ones are used
        per_block = {"size": (g.num_layers, widest), "dtype": torch.int32, "device": device}
        per_layer = {"size": (g.num_layers,), "dtype": torch.int32, "device": device}
        self.tables = BlockTables(
            table=torch.full((g.num_layers, num_host_pages, g.num_kv_heads), -1, dtype=torch.int32, device=device),
            owner=torch.full(fill_value=-1, **per_block),
            last_used=torch.full(fill_value=-1, **per_block),
            free_blocks=torch.zeros(**per_block),
            num_free=torch.zeros(**per_layer),
            hand=torch.zeros(**per_layer),
        )
        for number in self._cached:
            of_layer, n = self.of_layer(number), self.num_blocks[number]
            of_layer.free_blocks.copy_(torch.arange(n, dtype=torch.int32, device=device).flip(0))
            of_layer.num_free.fill_(n)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        every_pair = torch.arange(self._num_pairs, dtype=torch.int32, device=device)
        for number, kind in enumerate(kinds):
            if not kind.is_cached:
                self.tables.table[number] = every_pair.view(num_host_pages, g.num_kv_heads)
        # Runs of cached layers with as many blocks, which share one launch.
        runs = [list(run) for kind, run in groupby(range(g.num_layers), kinds.__getitem__) if kind.is_cached]
        self._runs = [self._layers(run[0], run[-1] + 1) for run in runs]

    def of_layer(self, number: int) -> BlockTables:
        """The state of a layer, with the leading dimension."""
        return self._layers(number, number + 1)

    def _layers(self, first: int, last: int) -> BlockTables:
        """The state of layers with as many blocks."""
        layers, num_blocks = self.tables.layers(first, last), self.num_blocks[first]
        owner, last_used, free_blocks = (
            x[:, :num_blocks] for x in (layers.owner, layers.last_used, layers.free_blocks)
        )
        return layers._replace(owner=owner, last_used=last_used, free_blocks=free_blocks)

    def advance(self, number: int) -> None:
        """Decode step `number` starts: the host counts the steps, the device follows."""
        if number % _LAST_STEP == 0:
            self.tables.last_used.clamp_(max=0)
            self.step.fill_(1)  # the next step is even, as its predecessor was odd
        self.step.add_(1)

    def forget(self, pairs: PairList) -> None:
        """Forget the blocks of pages that get a new owner."""
        for layers in self._runs:
            self._ops.forget_blocks(pairs, layers)

    def open(self, pairs: PairList) -> None:
        """Claim blocks for the pages that the next decode step starts; nothing to copy yet."""
        for layers in self._runs:
            self._ops.claim_blocks(pairs, layers, self.step, Claim.BETWEEN_STEPS, self._counters)

    def owner(self, layer: int) -> torch.Tensor:
        """Pair of each block of a layer, int64 ``[num_blocks]``, -1 where free."""
        if layer not in self._cached:
            return torch.arange(self._num_pairs, device=self.step.device)
        return self.of_layer(layer).owner[0].long()

    @property
    def num_resident(self) -> int:
        """Blocks in use over all cached layers."""
        num_free = self.tables.num_free.tolist()
        return sum(self.num_blocks[number] - num_free[number] for number in self._cached)

    @property
    def capacity(self) -> int:
        """Blocks over all cached layers, used or not."""
        return sum(self.num_blocks[number] for number in self._cached)

    def resident_share(self, pages: torch.Tensor) -> float:
        """Share of the KV of these host pages, int64 ``[n]``, that lies in blocks; waits for the device."""
        return (self.tables.table[:, pages] >= 0).float().mean().item()

    @property
    def nbytes(self) -> int:
        return sum(kv.nbytes for kv in self.kv)

    def check_integrity(self) -> None:
        """Raise if block table, owners, stamps and free blocks disagree."""
        for layer in self._cached:
            table, owner, last_used, free_blocks, num_free, _ = (x[0] for x in self.of_layer(layer))
            table = table.view(-1)
            pairs = (table >= 0).nonzero().flatten()
            held = (owner >= 0).nonzero().flatten()
            if len(pairs) != len(held) or not (owner[table[pairs].long()] == pairs).all():
                raise RuntimeError(f"device blocks: block table and owners of layer {layer} disagree")
            free = free_blocks[: int(num_free)].long()
            listed = torch.cat((free, held))
            if not torch.equal(listed.sort().values, torch.arange(len(owner), device=listed.device)):
                raise RuntimeError(f"device blocks: a block of layer {layer} is not either free or owned, once")
            if not (last_used[free] == -1).all():
                raise RuntimeError(f"device blocks: a free block of layer {layer} carries a stamp")
