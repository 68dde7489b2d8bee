"""Kernel of claim_blocks: a fixed number of programs per layer walk the list."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.claim_pairs_triton import CLAIMED, claim_pairs, num_claim_programs, search_sizes
from freekv_kernels.tables import BlockTables, Claim, MissList, PairList

# More than it takes: left alone, the ptxas of Triton 3.8 keeps to 80, for more programs at a time, and spills two.
_MAX_REGISTERS = 96


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
        tl.store(last_used_ptr + block, stamp, mask=last_used == CLAIMED)


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
        maxnreg=_MAX_REGISTERS,
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
            PAIRS=search_sizes()["PAIRS"],
            num_warps=2,
        )
