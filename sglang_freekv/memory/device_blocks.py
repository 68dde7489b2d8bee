"""Device blocks: a cache of (page, head) pairs over the host store."""

from __future__ import annotations

from itertools import groupby

import torch

from freekv_kernels import BlockTables, KeyList, Ops
from sglang_freekv.memory.geometry import Geometry

# Stamps are int32, two per step; long before they end, all of them become old.
_LAST_STEP = 1 << 29


class DeviceBlocks:
    """Blocks of K and V that attention reads. A block is never the only copy of a token, so evicting is forgetting.

    What may be evicted follows from stamps. Step t stamps the blocks of its front windows with 2t, and those of the
    back windows, which step t + 1 will read, with 2t + 1. Inside the step, blocks stamped 2t or later stay; between
    steps (prefill, new pages), blocks stamped 2t + 1. So ``2 * width * num_kv_heads`` blocks per request suffice.

    A dense layer has a block for every (page, head), at the block number of its key: it never misses.

    Attributes
    ----------
    kv : list over layers of model dtype ``[num_blocks, 2, page_size, head_dim]``, device
    tables : BlockTables
        Of all layers; of a dense layer only `table` is used.
    step : int64, ``[1]``, device
        Number of the decode step.
    """

    def __init__(
        self,
        geometry: Geometry,
        ops: Ops,
        *,
        num_pages: int,
        num_blocks: int,
        dense_layers: tuple[int, ...],
        device: str,
    ) -> None:
        g = geometry
        self.geometry, self.dense_layers, self._ops = g, frozenset(dense_layers), ops
        self._num_keys = num_pages * g.num_kv_heads
        layers = range(g.num_layers)
        self.num_blocks = [self._num_keys if layer in self.dense_layers else num_blocks for layer in layers]
        self.kv = [torch.empty((n, 2, g.page_size, g.head_dim), dtype=g.dtype, device=device) for n in self.num_blocks]
        for kv in self.kv:
            kv[:1].zero_()  # padding reads a token of block 0: numbers, as NaN could lead a router of experts astray
        per_block = {"size": (g.num_layers, num_blocks), "dtype": torch.int32, "device": device}
        per_layer = {"size": (g.num_layers,), "dtype": torch.int32, "device": device}
        self.tables = BlockTables(
            table=torch.full((g.num_layers, num_pages, g.num_kv_heads), -1, dtype=torch.int32, device=device),
            owner=torch.full(fill_value=-1, **per_block),
            last_used=torch.full(fill_value=-1, **per_block),
            free_blocks=torch.arange(num_blocks, dtype=torch.int32, device=device).flip(0).repeat(g.num_layers, 1),
            num_free=torch.full(fill_value=num_blocks, **per_layer),
            hand=torch.zeros(**per_layer),
        )
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        every_key = torch.arange(self._num_keys, dtype=torch.int32, device=device)
        for layer in self.dense_layers:
            self.tables.table[layer] = every_key.view(num_pages, g.num_kv_heads)
        # Runs of layers that share one launch.
        runs = (list(run) for is_dense, run in groupby(layers, lambda x: x in self.dense_layers) if not is_dense)
        self._cached_runs = [self.tables.layers(run[0], run[-1] + 1) for run in runs]

    def begin_step(self, number: int) -> None:
        """Decode step `number` starts: the host counts the steps, the device follows."""
        if number % _LAST_STEP == 0:
            self.tables.last_used.clamp_(max=0)
            self.step.fill_(1)  # the next step is even, as its predecessor was odd
        self.step.add_(1)

    def release(self, keys: KeyList) -> None:
        """Forget the blocks of pages that get a new owner."""
        for layers in self._cached_runs:
            self._ops.release_blocks(keys, layers)

    def open(self, keys: KeyList) -> None:
        """Claim blocks for the pages that the next decode step starts; nothing to copy yet."""
        for layers in self._cached_runs:
            self._ops.claim_blocks(keys, layers, self.step, protect_back=True, stamp_back=True)

    def owner(self, layer: int) -> torch.Tensor:
        """Key of each block of a layer, int64 ``[num_blocks]``, -1 where free."""
        if layer in self.dense_layers:
            return torch.arange(self._num_keys, device=self.step.device)
        return self.tables.owner[layer].long()

    @property
    def num_resident(self) -> int:
        """Blocks in use over all layers but the dense ones."""
        num_free = self.tables.num_free.tolist()
        layers = range(len(num_free))
        return sum(self.num_blocks[i] - num_free[i] for i in layers if i not in self.dense_layers)

    @property
    def capacity(self) -> int:
        """Blocks over all layers but the dense ones, used or not."""
        return sum(n for layer, n in enumerate(self.num_blocks) if layer not in self.dense_layers)

    @property
    def nbytes(self) -> int:
        return sum(kv.nbytes for kv in self.kv)

    def check_integrity(self) -> None:
        """Raise if block table, owners, stamps and free blocks disagree."""
        for layer in range(len(self.kv)):
            if layer in self.dense_layers:
                continue
            table, owner, last_used, free_blocks, num_free, _ = (x[layer] for x in self.tables)
            table = table.view(-1)
            keys = (table >= 0).nonzero().flatten()
            held = (owner >= 0).nonzero().flatten()
            if len(keys) != len(held) or not (owner[table[keys].long()] == keys).all():
                raise RuntimeError(f"device blocks: block table and owners of layer {layer} disagree")
            free = free_blocks[: int(num_free)].long()
            listed = torch.cat((free, held))
            if not torch.equal(listed.sort().values, torch.arange(len(owner), device=listed.device)):
                raise RuntimeError(f"device blocks: a block of layer {layer} is not either free or owned, once")
            if not (last_used[free] == -1).all():
                raise RuntimeError(f"device blocks: a free block of layer {layer} carries a stamp")
