"""`release_blocks` on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from freekv_kernels.tables import BlockTables, KeyList

# A decode step opens a few hundred keys at most, a prefill chunk of 8192 tokens 2048: one pass.
_NUM_PROGRAMS, _BLOCK_KEYS = 4, 512


def release_blocks(old: KeyList, blocks: BlockTables) -> None:
    """See `freekv_kernels.release_blocks`. A few programs per layer walk the list; its length is read on the device."""
    table, owner, last_used, free_blocks, num_free, _ = blocks
    _release_blocks_kernel[(_NUM_PROGRAMS, len(table))](
        old.keys,
        old.count,
        table,
        owner,
        last_used,
        free_blocks,
        num_free,
        table.stride(0),
        owner.stride(0),
        BLOCK_KEYS=_BLOCK_KEYS,
        num_warps=4,
    )


@triton.jit
def _release_blocks_kernel(
    keys_ptr,
    count_ptr,
    table_ptr,
    owner_ptr,
    last_used_ptr,
    free_blocks_ptr,
    num_free_ptr,
    table_stride,
    blocks_stride,
    BLOCK_KEYS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    table_ptr += layer * table_stride
    owner_ptr += layer * blocks_stride
    last_used_ptr += layer * blocks_stride
    free_blocks_ptr += layer * blocks_stride
    count = tl.load(count_ptr)
    # No key is listed twice, so no two programs meet at a key or a block. The atomic gives each its part of the stack,
    # and nobody takes from the stack in this launch.
    for first in range(tl.program_id(0) * BLOCK_KEYS, count, tl.num_programs(0) * BLOCK_KEYS):
        entry = first + tl.arange(0, BLOCK_KEYS)
        key = tl.load(keys_ptr + entry, entry < count, other=0)
        block = tl.load(table_ptr + key, entry < count, other=-1)
        is_held = (block >= 0).to(tl.int32)
        num_held = tl.sum(is_held, 0)
        if num_held > 0:
            top = tl.atomic_add(num_free_ptr + layer, num_held)
            position = top + tl.cumsum(is_held, 0) - is_held
            tl.store(free_blocks_ptr + position, block, block >= 0)
            tl.store(owner_ptr + block, -1, block >= 0)
            tl.store(last_used_ptr + block, -1, block >= 0)
            tl.store(table_ptr + key, -1, block >= 0)
