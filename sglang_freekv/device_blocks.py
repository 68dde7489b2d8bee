"""Device blocks: a cache of (page, head) pairs over the host store."""

from __future__ import annotations

import torch

import freekv_kernels as ops
from sglang_freekv.counters import Counters
from sglang_freekv.host_store import HostStore


class DeviceBlocks:
    """Blocks of K and V that attention reads. A block is never the only copy of a token, so evicting is forgetting.

    What may be evicted follows from stamps. Step t stamps the blocks of its front windows with 2t, and those of the
    back windows, which step t + 1 will read, with 2t + 1. Inside the step, blocks stamped 2t or later stay; between
    steps (prefill, new pages), blocks stamped 2t + 1. So ``2 * width * num_kv_heads`` blocks per request suffice.

    A dense layer has a block for every (page, head), at the block number of its key: it never misses.

    Attributes
    ----------
    kv : list over layers of model dtype ``[num_blocks, 2, page_size, head_dim]``, device
    table : int32, ``[num_layers, num_pages, num_kv_heads]``, device
        Block of each (page, head), -1 where not resident.
    owner : list over layers of int32 ``[num_blocks]``, device
        Key of each block, page * num_kv_heads + head; -1 where free.
    last_used : list over layers of int32 ``[num_blocks + 1]``, device
        Stamp of each block, -1 where free. The last entry is a sink, so that touching block -1 touches none.
    free_blocks : list over layers of int32 ``[num_blocks]``; num_free : list over layers of int64 ``[1]``, device
        A stack of the free blocks.
    """

    def __init__(
        self, host: HostStore, counters: Counters, num_blocks: int, dense_layers: tuple[int, ...], device: str
    ) -> None:
        g = host.geometry
        self.host, self.counters, self.dense_layers = host, counters, frozenset(dense_layers)
        num_keys = host.num_pages * g.num_kv_heads
        self.num_blocks = [num_keys if layer in self.dense_layers else num_blocks for layer in range(g.num_layers)]
        self.kv = [torch.empty((n, 2, g.page_size, g.head_dim), dtype=g.dtype, device=device) for n in self.num_blocks]
        self.table = torch.full((g.num_layers, host.num_pages, g.num_kv_heads), -1, dtype=torch.int32, device=device)
        self.owner = [torch.full((n,), -1, dtype=torch.int32, device=device) for n in self.num_blocks]
        self.last_used = [torch.full((n + 1,), -1, dtype=torch.int32, device=device) for n in self.num_blocks]
        self.free_blocks = [torch.arange(n, dtype=torch.int32, device=device).flip(0) for n in self.num_blocks]
        self.num_free = [torch.full((1,), n, dtype=torch.int64, device=device) for n in self.num_blocks]
        self.hand = [torch.zeros(1, dtype=torch.int64, device=device) for _ in self.num_blocks]
        self.step = 0
        every_key = torch.arange(num_keys, dtype=torch.int32, device=device)
        for layer in self.dense_layers:
            self.table[layer] = every_key.view(host.num_pages, g.num_kv_heads)
            self.owner[layer].copy_(every_key)
            self.num_free[layer].zero_()

    @property
    def front_stamp(self) -> int:
        return 2 * self.step

    @property
    def back_stamp(self) -> int:
        return 2 * self.step + 1

    def lookup(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """Blocks (int64) of keys of any shape, -1 where not resident."""
        return self.table[layer].view(-1)[keys].long()

    def touch(self, layer: int, blocks: torch.Tensor, stamp: int) -> None:
        """Mark blocks (int64, any shape, -1 for none) as used."""
        self.last_used[layer][blocks] = stamp

    def claim(self, layer: int, keys: torch.Tensor, protect_from: int, stamp: int) -> torch.Tensor:
        """Claim a block for each missing key (int64, no key twice); -1 for the last ones if victims run out."""
        return ops.claim_blocks(
            keys,
            self.table[layer].view(-1),
            self.owner[layer],
            self.last_used[layer][:-1],
            self.free_blocks[layer],
            self.num_free[layer],
            self.hand[layer],
            protect_from,
            stamp,
        )

    def recall(self, layer: int, keys: torch.Tensor, blocks: torch.Tensor) -> None:
        """Fetch keys from the host store into their blocks."""
        ops.recall_blocks(self.host.kv, layer, keys, blocks, self.kv[layer])
        self.counters.recalled_bytes += len(keys) * self.host.geometry.block_bytes

    def fetch(self, layer: int, keys: torch.Tensor, protect_from: int, stamp: int) -> int:
        """Make keys (int64, repeats allowed) resident as far as victims allow: one claim, one copy each.

        Returns the number of keys fetched.
        """
        keys = keys.unique()
        keys = keys[self.lookup(layer, keys) < 0]
        blocks = self.claim(layer, keys, protect_from, stamp)
        num_claimed = int((blocks >= 0).sum())
        self.recall(layer, keys[:num_claimed], blocks[:num_claimed])
        return num_claimed

    def reset_pages(self, pages: torch.Tensor) -> None:
        """Forget the blocks of pages (int64) that get a new owner."""
        for layer in range(len(self.kv)):
            if layer in self.dense_layers:
                continue
            blocks = self.table[layer][pages].flatten()
            blocks = blocks[blocks >= 0].long()
            num_free = int(self.num_free[layer])
            self.free_blocks[layer][num_free : num_free + len(blocks)] = blocks.int()
            self.num_free[layer] += len(blocks)
            self.owner[layer][blocks] = -1
            self.last_used[layer][blocks] = -1
            self.table[layer][pages] = -1

    def open_pages(self, pages: torch.Tensor) -> None:
        """Claim blocks for pages (int64) that decoding is about to start; nothing to copy yet."""
        num_kv_heads = self.host.geometry.num_kv_heads
        keys = (pages[:, None] * num_kv_heads + torch.arange(num_kv_heads, device=pages.device)).flatten()
        for layer in range(len(self.kv)):
            if layer not in self.dense_layers:
                self.claim(layer, keys, self.back_stamp, self.back_stamp)

    @property
    def num_resident(self) -> int:
        """Blocks in use over all layers but the dense ones."""
        layers = range(len(self.kv))
        return sum(self.num_blocks[i] - int(self.num_free[i]) for i in layers if i not in self.dense_layers)

    @property
    def nbytes(self) -> int:
        return sum(kv.nbytes for kv in self.kv)

    def check_integrity(self) -> None:
        """Raise if block table, owners, stamps and free blocks disagree."""
        for layer, owner in enumerate(self.owner):
            table = self.table[layer].view(-1)
            keys = (table >= 0).nonzero().flatten()
            held = (owner >= 0).nonzero().flatten()
            if len(keys) != len(held) or not (owner[table[keys].long()] == keys).all():
                raise RuntimeError(f"device blocks: block table and owners of layer {layer} disagree")
            free = self.free_blocks[layer][: int(self.num_free[layer])].long()
            listed = torch.cat((free, held))
            if not torch.equal(listed.sort().values, torch.arange(len(owner))):
                raise RuntimeError(f"device blocks: a block of layer {layer} is not either free or owned, once")
            if layer not in self.dense_layers and not (self.last_used[layer][free] == -1).all():
                raise RuntimeError(f"device blocks: a free block of layer {layer} carries a stamp")
