"""Claim device blocks for (page, head) pairs that have none: free ones, then the oldest that a clock hand passes."""

from __future__ import annotations

import torch

from freekv_kernels.tables import BlockTables, Claim, Count, MissList, PairList

# The hand passes blocks in groups, and the oldest that may go of each are taken, at most one of so many: nearly the
# oldest of all, and where a quarter of the blocks may go it is four looks for a claim.
_GROUP, OLDEST_OF = 64, 4
_STAYS = torch.iinfo(torch.int32).max  # as an age: may not go


def claim_blocks(
    wanted: PairList | MissList, blocks: BlockTables, step: torch.Tensor, claim: Claim, counters: torch.Tensor
) -> None:
    """Give each pair without a block a block: free blocks first, then old ones that the clock hand passes.

    A victim is a block with ``last_used < 2 * step + claim.protect_back``. Its owner loses its entry in the block
    table; nothing is copied, as a block is never the only copy of a token. A pair that is listed twice gets one block;
    a pair that has a block gets no other, and may lose its own as any other may, so callers list pairs that have none;
    if victims run out, pairs stay without one. No block is taken twice in a call.
    Which pair gets which of these blocks, or none, is left to the implementation; the reference serves the first pairs
    first.

    Parameters
    ----------
    wanted : PairList or MissList
        The same pairs for all layers. Of a MissList, `blocks` is written for the pairs of one layer: the claimed block
        at one entry of each pair, -1 at all others.
    blocks : BlockTables, of some layers
        Updated; claimed blocks are stamped ``2 * step + claim.stamp_back``.
    step : int64, ``[1]``, device
    claim : Claim
    counters : int64, ``[len(Count)]``, device
        EVICTIONS is advanced by the victims, LOOKS by the blocks that were looked at for them.
    """
    count = int(wanted.count)
    if count == 0:
        return
    stamp = 2 * int(step)
    pairs = wanted.pairs[:count]
    for layer in range(len(blocks.owner)):
        of_layer = BlockTables(*(x[layer] for x in blocks))
        claimed = _claim(pairs, of_layer, stamp + claim.protect_back, stamp + claim.stamp_back, counters)
        if isinstance(wanted, MissList):
            wanted.blocks[:count] = claimed


def _claim(
    pairs: torch.Tensor, blocks: BlockTables, protect_from: int, stamp: int, counters: torch.Tensor
) -> torch.Tensor:
    """Claim in one layer; int32 ``[num_pairs]``, the blocks to fill."""
    table, owner, last_used = blocks.table.view(-1), blocks.owner, blocks.last_used
    new, first_entry = _first_entries(pairs)
    is_new = table[new] < 0
    new, first_entry = new[is_new], first_entry[is_new]

    free = int(blocks.num_free)
    left = max(free - len(new), 0)
    claimed = blocks.free_blocks[left:free].flip(0).long()
    blocks.num_free.fill_(left)
    if len(claimed) < len(new):
        victims, num_looks = _next_victims(len(new) - len(claimed), last_used, blocks.hand, protect_from)
        counters[Count.EVICTIONS] += len(victims)
        counters[Count.LOOKS] += num_looks
        table[owner[victims].long()] = -1
        claimed = torch.cat((claimed, victims))

    new, first_entry = new[: len(claimed)], first_entry[: len(claimed)]
    table[new] = claimed.int()
    owner[claimed] = new.int()
    last_used[claimed] = stamp
    filled = pairs.new_full((len(pairs),), -1, dtype=torch.int32)
    filled[first_entry] = claimed.int()
    return filled


def _first_entries(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different pairs in the order in which they are listed, and where each is listed first."""
    different, which = pairs.unique(return_inverse=True)
    entries = torch.arange(len(pairs), device=pairs.device)
    first = entries.new_full((len(different),), len(pairs)).scatter_reduce_(0, which, entries, "amin").sort().values
    return pairs[first], first


def _next_victims(
    count: int, last_used: torch.Tensor, hand: torch.Tensor, protect_from: int
) -> tuple[torch.Tensor, int]:
    """Up to `count` used blocks (int64) that may go, and how many were looked at for them; moves the hand."""
    num_blocks, num_looks = len(last_used), 0
    victims = hand.new_empty(0, dtype=torch.int64)
    while len(victims) < count and num_looks < num_blocks:
        num_groups = -(-(count - len(victims)) // (_GROUP // OLDEST_OF))
        span = min(num_groups * _GROUP, num_blocks - num_looks)
        seen = (torch.arange(span, device=hand.device) + hand) % num_blocks
        hand += span
        num_looks += span
        oldest = _oldest(
            torch.nn.functional.pad(_ages(last_used[seen], protect_from), (0, -span % _GROUP), value=_STAYS)
        )
        victims = torch.cat((victims, seen[oldest]))[:count]
    if len(victims) < count:  # the groups had few that may go, or more than they gave: every block is a group
        ages = _ages(last_used, protect_from)
        victims, num_looks = ages.argsort(stable=True)[:count], num_looks + num_blocks
        victims = victims[ages[victims] < _STAYS]
    return victims, num_looks


def _ages(last_used: torch.Tensor, protect_from: int) -> torch.Tensor:
    """The stamps of blocks that may go, and of the others more than any."""
    return last_used.where((last_used >= 0) & (last_used < protect_from), _STAYS)


def _oldest(ages: torch.Tensor) -> torch.Tensor:
    """Indices of the oldest blocks of each group that may go, at most 1 of OLDEST_OF."""
    groups = ages.view(-1, _GROUP)
    oldest = groups.argsort(stable=True)[:, : _GROUP // OLDEST_OF]
    starts = torch.arange(0, len(ages), _GROUP, device=ages.device)[:, None]
    return (starts + oldest)[groups.gather(1, oldest) < _STAYS]
