"""How a program claims blocks: what the kernels of `claim_blocks` and `fetch_blocks` have in common."""

from __future__ import annotations

import triton
import triton.language as tl

from freekv_kernels.claim_blocks import OLDEST_OF
from freekv_kernels.tables import Count

_NUM_PROGRAMS = 64  # per layer: a fraction of the GPU
_PAIRS, _CANDIDATES = 16, 64  # per round: where a quarter of the blocks may go, one turn at the clock serves the round
_MAX_TURNS, _WIDE = 16, 256  # then every block, so many at a time, as registers allow

# Values that the tables hold only during a claim.
_CLAIMING = tl.constexpr(-2)  # in the block table: a program is finding a block for the pair
CLAIMED = tl.constexpr(2**31 - 1)  # as a stamp: claimed by this call
_SHARE = tl.constexpr(OLDEST_OF)
_EVICTIONS, _LOOKS = tl.constexpr(int(Count.EVICTIONS)), tl.constexpr(int(Count.LOOKS))
_STAYS = tl.constexpr(2**62)  # more than any stamp with a lane: may not go
_NEVER = tl.constexpr(-3)  # held by no table: lanes that have nothing to swap compare with it


@triton.jit
def _evict(
    start,
    num_seen,
    num_blocks,
    protect_from,
    stamp,
    rank,
    block,
    num_served,
    num_wanted,
    table_ptr,
    owner_ptr,
    last_used_ptr,
    SPAN: tl.constexpr,
    MOST: tl.constexpr,
):
    # Of the blocks from `start` on, at most SPAN, take the oldest that may go, at most MOST, for the pairs that wait:
    # their ranks are those after num_served, their blocks are -1. The blocks then; victims won, and lost to others.
    lane = tl.arange(0, SPAN)
    # Not from L1: a stale stamp would be looked at, and fail to be swapped.
    last_used = tl.load(
        last_used_ptr + (start + lane) % num_blocks, mask=lane < num_seen, other=-1, cache_modifier=".cg"
    )
    is_old = (last_used >= 0) & (last_used < protect_from)
    # Stamp and lane in one number, so that what is sorted says whose it is.
    stamped = tl.where(is_old, last_used.to(tl.int64) * SPAN + lane, _STAYS)
    oldest = -tl.topk(-stamped, MOST)
    is_victim = (oldest < _STAYS) & (tl.arange(0, MOST) < num_wanted - num_served)
    victim = (start + (oldest % SPAN).to(tl.int32)) % num_blocks
    last_used = (oldest // SPAN).to(tl.int32)

    old_pair = tl.load(owner_ptr + victim, mask=is_victim, other=-1)
    expected = tl.where(is_victim, last_used, _NEVER)
    stamps = tl.zeros_like(last_used) + stamp
    is_won = is_victim & (tl.atomic_cas(last_used_ptr + victim, expected, stamps, sem="relaxed") == last_used)
    tl.store(table_ptr + old_pair, -1, mask=is_won)
    won_rank = tl.where(is_won, num_served + tl.cumsum(is_won.to(tl.int32)), 0)
    is_match = rank[:, None] == won_rank[None, :]
    block += tl.sum(tl.where(is_match, victim[None, :] + 1, 0), 1)
    num_won = tl.sum(is_won.to(tl.int32))
    return block, num_won, tl.sum(is_victim.to(tl.int32)) - num_won


@triton.jit
def claim_pairs(
    program,
    num_programs,
    pairs_ptr,
    count_ptr,
    step_ptr,
    table_ptr,
    owner_ptr,
    last_used_ptr,
    free_blocks_ptr,
    num_free_ptr,
    hand_ptr,
    claimed_ptr,
    counters_ptr,
    num_blocks,
    PROTECT_BACK: tl.constexpr,
    STAMP_BACK: tl.constexpr,
    PAIRS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    MAX_TURNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Claim in one layer what falls to one program of several, for `claim_blocks` and `fetch_blocks`."""
    # A claimed block's stamp is no victim's, and during a claim stamps only rise: a block is claimed once in a launch,
    # so `owner` is as the launch found it where the swap of the stamp succeeds. Programs tell each other nothing but
    # the values of single cells: all atomics are relaxed. No program that claims waits for another.
    count, step = tl.load(count_ptr), tl.load(step_ptr).to(tl.int32)
    protect_from, stamp = 2 * step + PROTECT_BACK, 2 * step + STAMP_BACK
    if PROTECT_BACK and not STAMP_BACK:
        stamp = CLAIMED  # with 2 * step it would be a victim again
    max_turns, max_seen = tl.minimum(MAX_TURNS, tl.cdiv(num_blocks, CANDIDATES)), num_blocks
    num_evicted, num_looks = 0, 0

    for first in range(program * PAIRS, count, num_programs * PAIRS):
        entry = first + tl.arange(0, PAIRS)
        is_entry = entry < count
        pair = tl.load(pairs_ptr + entry, mask=is_entry, other=0)
        # Of all lanes of all programs that list a pair, one finds -1. It alone writes the entry from then on, even if
        # -1 comes from a program that evicted the pair in this launch: that store has been seen, and is not repeated.
        expected_block = tl.where(is_entry, -1, _NEVER)
        old_block = tl.atomic_cas(
            table_ptr + pair, expected_block, tl.full((PAIRS,), _CLAIMING, tl.int32), sem="relaxed"
        )
        is_ours = is_entry & (old_block == -1)
        rank = tl.where(is_ours, tl.cumsum(is_ours.to(tl.int32)), -1)  # from 1
        num_wanted = tl.sum(is_ours.to(tl.int32))
        block = tl.full((PAIRS,), -1, tl.int32)
        if num_wanted > 0:
            # What was taken below zero is given back. Until then others see too few, and never miss a free block by
            # it: below zero means that somebody has emptied the stack, which nobody fills during a claim.
            num_free = tl.atomic_add(num_free_ptr, -num_wanted, sem="relaxed")
            num_served = tl.minimum(tl.maximum(num_free, 0), num_wanted)
            if num_served < num_wanted:
                tl.atomic_add(num_free_ptr, num_wanted - num_served, sem="relaxed")
            block = tl.load(free_blocks_ptr + num_free - rank, mask=is_ours & (rank <= num_served), other=-1)
            tl.store(last_used_ptr + block, stamp, mask=block >= 0)

            # Programs take turns at one clock, so each turn sees other blocks. Turns wrap at 2**32, which does no more
            # than move the hand.
            num_turns = 0
            while (num_served < num_wanted) & (num_turns < max_turns):
                turn = tl.atomic_add(hand_ptr, CANDIDATES, sem="relaxed").to(tl.uint32)
                num_seen = tl.minimum(CANDIDATES, num_blocks)
                block, num_won, _ = _evict(
                    (turn % num_blocks.to(tl.uint32)).to(tl.int32),
                    num_seen,
                    num_blocks,
                    protect_from,
                    stamp,
                    rank,
                    block,
                    num_served,
                    num_wanted,
                    table_ptr,
                    owner_ptr,
                    last_used_ptr,
                    CANDIDATES,
                    CANDIDATES // _SHARE,
                )
                num_served += num_won
                num_evicted += num_won
                num_looks += num_seen
                num_turns += 1
            # Hardly a block may go, or other turns have passed those that may: look at every block, many at a time.
            seen = 0
            while (num_served < num_wanted) & (seen < max_seen):
                num_seen = tl.minimum(WIDE, num_blocks - seen)
                block, num_won, num_lost = _evict(
                    (seen + program * WIDE) % num_blocks,
                    num_seen,
                    num_blocks,
                    protect_from,
                    stamp,
                    rank,
                    block,
                    num_served,
                    num_wanted,
                    table_ptr,
                    owner_ptr,
                    last_used_ptr,
                    WIDE,
                    PAIRS,
                )
                num_served += num_won
                num_evicted += num_won
                num_looks += num_seen
                # Where a victim was lost, others may have been left: look again. Losses end, as each is another's gain.
                seen += tl.where(num_lost == 0, WIDE, 0)
            if num_served < num_wanted:
                max_turns, max_seen = 0, 0  # no victim is left for the rest of the launch

            tl.store(owner_ptr + block, pair.to(tl.int32), mask=block >= 0)
            tl.store(table_ptr + pair, block, mask=is_ours)
        if claimed_ptr is not None:
            tl.store(claimed_ptr + entry, block, mask=is_entry)
    if num_looks > 0:
        tl.atomic_add(counters_ptr + _EVICTIONS, num_evicted.to(tl.int64), sem="relaxed")
        tl.atomic_add(counters_ptr + _LOOKS, num_looks.to(tl.int64), sem="relaxed")


def num_claim_programs(num_entries: int) -> int:
    """Programs that claim for a list of at most so many entries, in one layer."""
    return min(_NUM_PROGRAMS, triton.cdiv(num_entries, _PAIRS))


def search_sizes() -> dict[str, int]:
    """How many pairs and blocks a program of `claim_pairs` has in hand at once."""
    return {"PAIRS": _PAIRS, "CANDIDATES": _CANDIDATES, "MAX_TURNS": _MAX_TURNS, "WIDE": _WIDE}
