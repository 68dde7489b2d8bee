"""Kernel of claim_blocks: a fixed number of programs per layer walk the list."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.claim_blocks import OLDEST_OF
from freekv_kernels.tables import BlockTables, Claim, Count, MissList, PairList

_NUM_PROGRAMS = 64  # per layer, of 2 warps: a fraction of the GPU
_PAIRS, _CANDIDATES = 16, 64  # per round: where a quarter of the blocks may go, one turn at the clock serves the round
_MAX_TURNS, _WIDE = 16, 256  # then every block, so many at a time, as registers allow

# Values that the tables hold only during a claim.
_CLAIMING = tl.constexpr(-2)  # in the block table: a program is finding a block for the pair
_CLAIMED = tl.constexpr(2**31 - 1)  # as a stamp: claimed by this call
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
    # the values of single cells: all atomics are relaxed. No program ever waits for another.
    count, step = tl.load(count_ptr), tl.load(step_ptr).to(tl.int32)
    protect_from, stamp = 2 * step + PROTECT_BACK, 2 * step + STAMP_BACK
    if PROTECT_BACK and not STAMP_BACK:
        stamp = _CLAIMED  # with 2 * step it would be a victim again
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


@triton.jit(
    do_not_specialize=["num_blocks"],
    do_not_specialize_on_alignment=[
        "count_ptr",
        "table_ptr",
        "owner_ptr",
        "last_used_ptr",
        "free_blocks_ptr",
        "num_free_ptr",
        "hand_ptr",
    ],
)
def _claim_blocks_kernel(
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
    table_stride,
    owner_stride,
    last_used_stride,
    free_blocks_stride,
    num_blocks,
    PROTECT_BACK: tl.constexpr,
    STAMP_BACK: tl.constexpr,
    PAIRS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    MAX_TURNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    table_ptr += layer * table_stride
    owner_ptr += layer * owner_stride
    last_used_ptr += layer * last_used_stride
    free_blocks_ptr += layer * free_blocks_stride
    num_free_ptr += layer
    hand_ptr += layer

    claim_pairs(
        tl.program_id(0),
        tl.num_programs(0),
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
        PROTECT_BACK,
        STAMP_BACK,
        PAIRS,
        CANDIDATES,
        MAX_TURNS,
        WIDE,
    )


@triton.jit(do_not_specialize_on_alignment=["count_ptr", "table_ptr", "last_used_ptr"])
def _stamp_blocks_kernel(
    pairs_ptr,
    count_ptr,
    step_ptr,
    table_ptr,
    last_used_ptr,
    table_stride,
    last_used_stride,
    PAIRS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    table_ptr += layer * table_stride
    last_used_ptr += layer * last_used_stride
    count, stamp = tl.load(count_ptr), 2 * tl.load(step_ptr).to(tl.int32)
    for first in range(tl.program_id(0) * PAIRS, count, tl.num_programs(0) * PAIRS):
        entry = first + tl.arange(0, PAIRS)
        pair = tl.load(pairs_ptr + entry, mask=entry < count, other=0)
        block = tl.load(table_ptr + pair, mask=entry < count, other=-1)
        last_used = tl.load(last_used_ptr + block, mask=block >= 0, other=-1)
        tl.store(last_used_ptr + block, stamp, mask=last_used == _CLAIMED)


def num_claim_programs(num_entries: int) -> int:
    """Programs that claim for a list of at most so many entries, in one layer."""
    return min(_NUM_PROGRAMS, triton.cdiv(num_entries, _PAIRS))


def search_sizes() -> dict[str, int]:
    """How many pairs and blocks a program of `claim_pairs` has in hand at once."""
    return {"PAIRS": _PAIRS, "CANDIDATES": _CANDIDATES, "MAX_TURNS": _MAX_TURNS, "WIDE": _WIDE}


def claim_blocks(
    wanted: PairList | MissList, blocks: BlockTables, step: torch.Tensor, claim: Claim, counters: torch.Tensor
) -> None:
    """See `freekv_kernels.claim_blocks`. The grid depends on shapes only: a CUDA graph can hold it.

    Which blocks are taken, for which pairs, and which pairs go without if victims run out, is left to chance.
    No other kernel may work on the same layers' tables at the same time.
    """
    num_layers, num_blocks = blocks.owner.shape
    grid = (num_claim_programs(len(wanted.pairs)), num_layers)
    _claim_blocks_kernel[grid](
        wanted.pairs,
        wanted.count,
        step,
        blocks.table,
        blocks.owner,
        blocks.last_used,
        blocks.free_blocks,
        blocks.num_free,
        blocks.hand,
        wanted.blocks if isinstance(wanted, MissList) else None,
        counters,
        blocks.table.stride(0),
        blocks.owner.stride(0),
        blocks.last_used.stride(0),
        blocks.free_blocks.stride(0),
        num_blocks,
        PROTECT_BACK=claim.protect_back,
        STAMP_BACK=claim.stamp_back,
        **search_sizes(),
        num_warps=2,
    )
    if claim == Claim.AS_OLD:
        _stamp_blocks_kernel[grid](
            wanted.pairs,
            wanted.count,
            step,
            blocks.table,
            blocks.last_used,
            blocks.table.stride(0),
            blocks.last_used.stride(0),
            PAIRS=_PAIRS,
            num_warps=2,
        )
