"""`forget_blocks` on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from freekv_kernels.tables import BlockTables, PairList

# A decode step opens a few hundred pairs at most, a prefill chunk of 8192 tokens 2048: one pass.
_NUM_PROGRAMS, _BLOCK_PAIRS = 4, 512


def forget_blocks(old: PairList, blocks: BlockTables) -> None:
    """See `freekv_kernels.forget_blocks`. A few programs per layer walk the list; its length is read on the device."""
    table, owner, last_used, free_blocks, num_free, _ = blocks
    _forget_blocks_kernel[(_NUM_PROGRAMS, len(table))](
        old.pairs,
        old.count,
        table,
        owner,
        last_used,
        free_blocks,
        num_free,
        table.stride(0),
        owner.stride(0),
        BLOCK_PAIRS=_BLOCK_PAIRS,
        num_warps=4,
    )


@triton.jit
def _forget_blocks_kernel(
    pairs_ptr,
    count_ptr,
    table_ptr,
    owner_ptr,
    last_used_ptr,
    free_blocks_ptr,
    num_free_ptr,
    table_stride,
    blocks_stride,
    BLOCK_PAIRS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    table_ptr += layer * table_stride
    owner_ptr += layer * blocks_stride
    last_used_ptr += layer * blocks_stride
    free_blocks_ptr += layer * blocks_stride
    count = tl.load(count_ptr)
    # No pair is listed twice, so no two programs meet at a pair or a block. The atomic gives each its part of the
    # stack, and nobody takes from the stack in this launch, so it orders nothing.
    for first in range(tl.program_id(0) * BLOCK_PAIRS, count, tl.num_programs(0) * BLOCK_PAIRS):
        entry = first + tl.arange(0, BLOCK_PAIRS)
        pair = tl.load(pairs_ptr + entry, entry < count, other=0)
        block = tl.load(table_ptr + pair, entry < count, other=-1)
        is_held = (block >= 0).to(tl.int32)
        num_held = tl.sum(is_held, 0)
        if num_held > 0:
            top = tl.atomic_add(num_free_ptr + layer, num_held, sem="relaxed")
            position = top + tl.cumsum(is_held, 0) - is_held
            tl.store(free_blocks_ptr + position, block, block >= 0)
            tl.store(owner_ptr + block, -1, block >= 0)
            tl.store(last_used_ptr + block, -1, block >= 0)
            tl.store(table_ptr + pair, -1, block >= 0)
