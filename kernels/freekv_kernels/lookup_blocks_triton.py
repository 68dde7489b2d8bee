"""Kernel of lookup_blocks: one program per (request, KV head)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.tables import Batch, BlockTables, Count, FlagList, Half, MissList

_FRONT, _BACK = tl.constexpr(int(Half.FRONT)), tl.constexpr(int(Half.BACK))
_HITS, _MISSES = tl.constexpr(int(Count.HITS)), tl.constexpr(int(Count.MISSES))
_DEMAND_MISSES = tl.constexpr(int(Count.DEMAND_MISSES))


@triton.jit
def look_up_row(
    row,
    windows_ptr,
    rows_ptr,
    page_table_ptr,
    num_pages_ptr,
    num_pages_next_ptr,
    budget_pages_ptr,
    step_ptr,
    table_ptr,
    is_flagged_ptr,
    kv_indptr_ptr,
    last_used_ptr,
    miss_pairs_ptr,
    miss_entries_ptr,
    miss_count_ptr,
    kv_indices_ptr,
    counters_ptr,
    windows_half_stride,
    windows_row_stride,
    page_table_stride,
    NUM_KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HALF: tl.constexpr,
):
    """Look up the window of one row, for `lookup_blocks` and `fetch_blocks`."""
    request, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    num_pages, step = tl.load(num_pages_ptr + request), tl.load(step_ptr)
    num_entries = tl.load(budget_pages_ptr + row)
    is_within_next = tl.load(num_pages_next_ptr + request) <= num_entries
    is_selected = tl.full((), True, tl.int1)
    half, stamp = (step + 1) % 2, 2 * step + 1
    if HALF == _FRONT:
        half, stamp = step % 2, 2 * step + is_within_next.to(tl.int64)
        is_selected = tl.load(is_flagged_ptr + row)
        start = tl.load(kv_indptr_ptr + row)
        num_entries = (tl.load(kv_indptr_ptr + row + 1) - start).to(tl.int64)
    elif HALF == _BACK:
        num_entries = tl.where(is_within_next, 0, num_entries)

    entry = tl.arange(0, BLOCK_W)
    is_entry = (entry < WIDTH) & (entry < num_entries)
    window = half * windows_half_stride + tl.load(rows_ptr + request) * windows_row_stride + head * WIDTH
    page = tl.load(windows_ptr + window + entry, mask=is_entry, other=-1)
    is_valid = (page >= 0) & (page < num_pages)
    page_table = request.to(tl.int64) * page_table_stride
    host_page = tl.load(page_table_ptr + page_table + page, mask=is_valid, other=0)
    pair = host_page * NUM_KV_HEADS + head
    block = tl.load(table_ptr + pair, mask=is_valid, other=-1)
    is_found, is_missing = block >= 0, is_valid & (block < 0)
    if HALF == _FRONT:
        tl.store(kv_indices_ptr + start + entry, tl.maximum(block, 0), mask=is_entry)

    # Rows share blocks, the list and counters; who reads what comes of it waits for all rows, so no order is asked for.
    tl.atomic_max(last_used_ptr + block, stamp.to(tl.int32), mask=is_found, sem="relaxed")
    num_found, num_missing = tl.sum(is_found.to(tl.int32)), tl.sum(is_missing.to(tl.int32))
    if is_selected & (num_found > 0):
        tl.atomic_add(counters_ptr + _HITS, num_found, sem="relaxed")
    if num_missing > 0:
        kind = tl.where(is_selected, _MISSES, _DEMAND_MISSES)
        tl.atomic_add(counters_ptr + kind, num_missing, sem="relaxed")
        first = tl.atomic_add(miss_count_ptr, num_missing, sem="relaxed")
        miss = first + tl.cumsum(is_missing.to(tl.int32)) - 1
        tl.store(miss_pairs_ptr + miss, pair, mask=is_missing)
        if HALF == _FRONT:
            tl.store(miss_entries_ptr + miss, start + entry, mask=is_missing)


@triton.jit(
    do_not_specialize=["page_table_stride"],
    do_not_specialize_on_alignment=["windows_ptr", "table_ptr", "last_used_ptr", "miss_count_ptr"],
)
def _lookup_blocks_kernel(
    windows_ptr,
    rows_ptr,
    page_table_ptr,
    num_pages_ptr,
    num_pages_next_ptr,
    budget_pages_ptr,
    step_ptr,
    table_ptr,
    is_flagged_ptr,
    kv_indptr_ptr,
    last_used_ptr,
    miss_pairs_ptr,
    miss_entries_ptr,
    miss_count_ptr,
    kv_indices_ptr,
    counters_ptr,
    windows_half_stride,
    windows_row_stride,
    page_table_stride,
    NUM_KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HALF: tl.constexpr,
):
    look_up_row(
        tl.program_id(0),
        windows_ptr,
        rows_ptr,
        page_table_ptr,
        num_pages_ptr,
        num_pages_next_ptr,
        budget_pages_ptr,
        step_ptr,
        table_ptr,
        is_flagged_ptr,
        kv_indptr_ptr,
        last_used_ptr,
        miss_pairs_ptr,
        miss_entries_ptr,
        miss_count_ptr,
        kv_indices_ptr,
        counters_ptr,
        windows_half_stride,
        windows_row_stride,
        page_table_stride,
        NUM_KV_HEADS,
        WIDTH,
        BLOCK_W,
        HALF,
    )


def lookup_blocks(
    windows: torch.Tensor,
    batch: Batch,
    half: Half,
    blocks: BlockTables,
    misses: MissList,
    counters: torch.Tensor,
    flags: FlagList | None = None,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
) -> None:
    """See `freekv_kernels.lookup_blocks`. The grid depends on the batch size only: a CUDA graph can hold it.

    The misses are listed in any order.
    """
    num_kv_heads, width = windows.shape[2:]
    block_w = triton.next_power_of_2(width)
    _lookup_blocks_kernel[(len(batch.rows) * num_kv_heads,)](
        windows,
        batch.rows,
        batch.page_table,
        batch.num_pages,
        batch.num_pages_next,
        batch.budget_pages,
        batch.step,
        blocks.table,
        flags.is_flagged if flags else None,
        kv_indptr,
        blocks.last_used,
        misses.pairs,
        misses.entries,
        misses.count,
        kv_indices,
        counters,
        windows.stride(0),
        windows.stride(1),
        batch.page_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        WIDTH=width,
        BLOCK_W=block_w,
        HALF=int(half),
        num_warps=max(1, min(block_w // 128, 4)),  # one warp needs no barriers to count a usual window
    )
