"""Kernel of correct_windows: the selection of every row, in the back half, and one program per row that judges it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.ranks_triton import columns_of, num_below
from freekv_kernels.select_pages_triton import select_pages
from freekv_kernels.tables import Batch, Count, FlagList, Half

_FLAGGED_ROWS = tl.constexpr(int(Count.FLAGGED_ROWS))


@triton.jit
def _share_of(window, shares_ptr, pages_ptr, begin, end, NUM_LOOKS: tl.constexpr):
    """What the pages of a window have together, of those that may be selected."""
    column = window
    if pages_ptr is not None:
        column = columns_of(window, pages_ptr, begin, end, NUM_LOOKS)
    is_page = (column >= begin) & (column < end)
    return tl.sum(tl.exp(tl.load(shares_ptr + column, mask=is_page, other=float("-inf"))))


@triton.jit(do_not_specialize=["shares_stride", "num_columns"], do_not_specialize_on_alignment=["flag_count_ptr"])
def _judge_windows_kernel(
    shares_ptr,
    rows_ptr,
    num_pages_ptr,
    budget_pages_ptr,
    step_ptr,
    windows_ptr,
    pages_ptr,
    flag_rows_ptr,
    flag_count_ptr,
    is_flagged_ptr,
    counters_ptr,
    gate,
    num_columns,
    shares_stride,
    pages_stride,
    windows_half_stride,
    windows_row_stride,
    windows_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    NUM_LOOKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0)
    request, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    num_pages = tl.load(num_pages_ptr + request).to(tl.int32)
    budget = tl.load(budget_pages_ptr + row).to(tl.int32)
    if num_pages <= budget:
        tl.store(is_flagged_ptr + row, False)
        return
    windows_ptr += tl.load(rows_ptr + request) * windows_row_stride + head.to(tl.int64) * windows_head_stride
    step = tl.load(step_ptr)
    column = tl.arange(0, BLOCK_W)
    front_ptrs = windows_ptr + step % 2 * windows_half_stride + column
    back_ptrs = windows_ptr + (step + 1) % 2 * windows_half_stride + column
    is_selected = (column >= SINK) & (column < budget - RECENT)
    held = tl.load(front_ptrs, mask=is_selected, other=-1)
    best = tl.load(back_ptrs, mask=column < WIDTH, other=-1)

    shares_ptr += row.to(tl.int64) * shares_stride
    end = num_pages - RECENT
    if pages_ptr is not None:
        pages_ptr += row.to(tl.int64) * pages_stride
        end = num_below(pages_ptr, num_pages - RECENT, num_columns, BLOCK)
    held_share = _share_of(held, shares_ptr, pages_ptr, SINK, end, NUM_LOOKS)
    best_share = _share_of(tl.where(is_selected, best, -1), shares_ptr, pages_ptr, SINK, end, NUM_LOOKS)
    is_flagged = best_share - held_share > gate
    tl.store(is_flagged_ptr + row, is_flagged)
    if is_flagged:
        tl.store(front_ptrs, best, mask=column < WIDTH)
        tl.store(flag_rows_ptr + tl.atomic_add(flag_count_ptr, 1, sem="relaxed"), row)
        tl.atomic_add(counters_ptr + _FLAGGED_ROWS, 1, sem="relaxed")


def correct_windows(
    shares: torch.Tensor,
    batch: Batch,
    gate: float,
    sink_pages: int,
    recent_pages: int,
    windows: torch.Tensor,
    flags: FlagList,
    counters: torch.Tensor,
    hysteresis: float = 0.0,
    pages: torch.Tensor | None = None,
) -> None:
    """See `freekv_kernels.correct_windows`. The grids depend on shapes only, and nothing is allocated."""
    rule = (sink_pages, recent_pages, "mean", windows, None, 1.0, hysteresis, pages)
    select_pages(shares, batch, Half.FRONT, *rule, target=Half.BACK)
    num_rows, _, num_columns = shares.shape
    _judge_windows_kernel[(num_rows,)](
        shares,
        batch.rows,
        batch.num_pages,
        batch.budget_pages,
        batch.step,
        windows,
        pages,
        flags.rows,
        flags.count,
        flags.is_flagged,
        counters,
        gate,
        num_columns,
        shares.stride(0),
        0 if pages is None else pages.stride(0),
        *windows.stride()[:3],
        NUM_KV_HEADS=windows.shape[2],
        WIDTH=windows.shape[3],
        SINK=sink_pages,
        RECENT=recent_pages,
        NUM_LOOKS=num_columns.bit_length(),
        BLOCK=min(1024, triton.next_power_of_2(num_columns)),
        BLOCK_W=triton.next_power_of_2(windows.shape[3]),
        num_warps=1,
    )
