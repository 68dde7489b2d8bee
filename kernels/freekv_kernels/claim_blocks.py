"""Claim device blocks for missing (page, head) pairs, with a clock hand."""

from __future__ import annotations

import torch


def claim_blocks(
    keys: torch.Tensor,
    block_table: torch.Tensor,
    owner: torch.Tensor,
    last_used: torch.Tensor,
    hand: torch.Tensor,
    protect_from: int,
    stamp: int,
) -> torch.Tensor:
    """Give each key a block: free blocks first, then the next victims after the clock hand.

    A victim is a block with last_used < protect_from. Its owner loses its entry in the block table; nothing is copied,
    as a block is never the only copy of a token.

    Parameters
    ----------
    keys : int64, ``[num_keys]``, device
        page * num_kv_heads + head, no key twice, none resident.
    block_table : int32, ``[num_pages * num_kv_heads]``, device
        key -> block, -1 where not resident; updated in place.
    owner : int32, ``[num_blocks]``, device
        block -> key, -1 where free; updated in place.
    last_used : int32, ``[num_blocks]``, device
        Stamp of the last use, -1 where free; updated in place.
    hand : int64, ``[1]``, device
        Where the search starts; moved past the last victim.
    protect_from : int
        Blocks with this stamp or a later one are read in this step or claimed for the next one.
    stamp : int
        Written to last_used of the claimed blocks.

    Returns
    -------
    int64, ``[num_keys]``
        The blocks, in the order of the keys; -1 for the last keys if the victims ran out.
    """
    num_blocks, num_keys = len(owner), len(keys)
    order = (torch.arange(num_blocks, device=owner.device) + hand) % num_blocks
    is_free = (owner < 0)[order]
    free = order[is_free][:num_keys]
    evictable = order[~is_free & (last_used < protect_from)[order]][: num_keys - len(free)]
    claimed = torch.cat((free, evictable))
    if len(evictable):
        hand[0] = (evictable[-1] + 1) % num_blocks

    block_table[owner[evictable].long()] = -1
    block_table[keys[: len(claimed)]] = claimed.int()
    owner[claimed] = keys[: len(claimed)].int()
    last_used[claimed] = stamp
    return torch.nn.functional.pad(claimed, (0, num_keys - len(claimed)), value=-1)
