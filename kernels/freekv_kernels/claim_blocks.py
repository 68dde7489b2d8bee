"""Claim device blocks for missing (page, head) pairs, with a clock hand."""

from __future__ import annotations

import torch

# Blocks looked at first beyond a few per victim: most of what the hand meets may be taken.
_SEARCH_MARGIN = 64


def claim_blocks(
    keys: torch.Tensor,
    block_table: torch.Tensor,
    owner: torch.Tensor,
    last_used: torch.Tensor,
    free_blocks: torch.Tensor,
    num_free: torch.Tensor,
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
    free_blocks : int32, ``[num_blocks]``, device
        A stack: the first num_free entries are the free blocks; taken from the top.
    num_free : int64, ``[1]``, device
    hand : int64, ``[1]``, device
        Where the search for victims starts; moved past the last one.
    protect_from : int
        Blocks with this stamp or a later one are read in this step or claimed for the next one.
    stamp : int
        Written to last_used of the claimed blocks.

    Returns
    -------
    int64, ``[num_keys]``
        The blocks, in the order of the keys; -1 for the last keys if the victims ran out.
    """
    num_keys, free = len(keys), int(num_free)
    left = max(free - num_keys, 0)
    claimed = free_blocks[left:free].flip(0).long()
    num_free.fill_(left)
    if len(claimed) < num_keys:
        victims = _next_victims(num_keys - len(claimed), last_used, hand, protect_from)
        block_table[owner[victims].long()] = -1
        claimed = torch.cat((claimed, victims))

    block_table[keys[: len(claimed)]] = claimed.int()
    owner[claimed] = keys[: len(claimed)].int()
    last_used[claimed] = stamp
    return torch.nn.functional.pad(claimed, (0, num_keys - len(claimed)), value=-1)


def _next_victims(count: int, last_used: torch.Tensor, hand: torch.Tensor, protect_from: int) -> torch.Tensor:
    """Up to `count` used blocks (int64) that may go, from the hand on; moves the hand."""
    num_blocks = len(last_used)
    span = min(4 * count + _SEARCH_MARGIN, num_blocks)
    while True:
        seen = (torch.arange(span, device=hand.device) + hand) % num_blocks
        stamps = last_used[seen]
        victims = seen[(stamps >= 0) & (stamps < protect_from)][:count]
        if len(victims) == count or span == num_blocks:
            break
        span = min(2 * span, num_blocks)
    if len(victims):
        hand.copy_((victims[-1:] + 1) % num_blocks)
    return victims
