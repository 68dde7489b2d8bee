"""Claim device blocks for (page, head) pairs that have none, with a clock hand."""

from __future__ import annotations

import torch

from freekv_kernels.tables import BlockTables, KeyList, MissList

# Blocks looked at first beyond a few per victim: most of what the hand meets may be taken.
_SEARCH_MARGIN = 64


def claim_blocks(
    wanted: KeyList | MissList, blocks: BlockTables, step: torch.Tensor, protect_back: bool, stamp_back: bool
) -> None:
    """Give each key without a block a block: free blocks first, then the next victims after the clock hand.

    A victim is a block with ``last_used < 2 * step + protect_back``. Its owner loses its entry in the block table;
    nothing is copied, as a block is never the only copy of a token. A key that is listed twice gets one block; a key
    that has a block keeps it; if victims run out, keys stay without one. No block is taken twice in a call. Which key
    gets which of these blocks, or none, is left to the implementation; the reference serves the first keys first.

    Parameters
    ----------
    wanted : KeyList or MissList
        The same keys for all layers. Of a MissList, `blocks` is written for the keys of one layer: the claimed block at
        one entry of each key, -1 at all others.
    blocks : BlockTables, of some layers
        Updated; claimed blocks are stamped ``2 * step + stamp_back``.
    step : int64, ``[1]``, device
    protect_back : bool
        Between steps the blocks that the next step reads stay (True); within a step, those of this step too (False).
    stamp_back : bool
        Whether the next step reads the claimed blocks.
    """
    count = int(wanted.count)
    if count == 0:
        return
    stamp = 2 * int(step)
    keys = wanted.keys[:count]
    for layer in range(len(blocks.owner)):
        claimed = _claim(keys, BlockTables(*(x[layer] for x in blocks)), stamp + protect_back, stamp + stamp_back)
        if isinstance(wanted, MissList):
            wanted.blocks[:count] = claimed


def _claim(keys: torch.Tensor, blocks: BlockTables, protect_from: int, stamp: int) -> torch.Tensor:
    """Claim in one layer; int32 ``[num_keys]``, the blocks to fill."""
    table, owner, last_used = blocks.table.view(-1), blocks.owner, blocks.last_used
    new, first_entry = _first_entries(keys)
    is_new = table[new] < 0
    new, first_entry = new[is_new], first_entry[is_new]

    free = int(blocks.num_free)
    left = max(free - len(new), 0)
    claimed = blocks.free_blocks[left:free].flip(0).long()
    blocks.num_free.fill_(left)
    if len(claimed) < len(new):
        victims = _next_victims(len(new) - len(claimed), last_used, blocks.hand, protect_from)
        table[owner[victims].long()] = -1
        claimed = torch.cat((claimed, victims))

    new, first_entry = new[: len(claimed)], first_entry[: len(claimed)]
    table[new] = claimed.int()
    owner[claimed] = new.int()
    last_used[claimed] = stamp
    filled = keys.new_full((len(keys),), -1, dtype=torch.int32)
    filled[first_entry] = claimed.int()
    return filled


def _first_entries(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different keys in the order in which they are listed, and where each is listed first."""
    different, which = keys.unique(return_inverse=True)
    entries = torch.arange(len(keys), device=keys.device)
    first = entries.new_full((len(different),), len(keys)).scatter_reduce_(0, which, entries, "amin").sort().values
    return keys[first], first


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
        hand.fill_((int(victims[-1]) + 1) % num_blocks)
    return victims
