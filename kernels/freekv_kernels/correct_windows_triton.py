"""Kernel of correct_windows: one program per row shares, judges, corrects and selects."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.correct_windows import CALM
from freekv_kernels.dependent_launch_triton import (
    dependent_launch,
    let_the_next_kernel_come,
    wait_for_the_kernel_before,
)
from freekv_kernels.ranks_triton import columns_of, num_below, sortable, write_largest
from freekv_kernels.share_pages_triton import share_row, tensors_and_sizes
from freekv_kernels.tables import Batch, Count, FlagList, PageStore

_FLAGGED_ROWS = tl.constexpr(int(Count.FLAGGED_ROWS))
_CALM = tl.constexpr(CALM)
_MAX_REGISTERS = 128  # two programs fit on a multiprocessor; without a bound ptxas makes room for three, and spills


@triton.jit
def _select(
    shares_ptr,
    held,
    is_held,
    k,
    begin,
    end,
    hysteresis,
    pages_ptr,
    written_ptr,
    BLOCK: tl.constexpr,
):
    """Write the k best pages, where columns that are held are favoured; the share of those, which stay as they were."""
    own = tl.load(shares_ptr + held, mask=is_held, other=float("-inf"))
    tl.debug_barrier()  # threads that hold the same lanes read before one of them writes
    tl.store(shares_ptr + held, own + hysteresis, mask=is_held)
    tl.debug_barrier()
    lowest, highest = tl.full((), 0xFFFFFFFF, tl.uint32), tl.full((), 0, tl.uint32)
    for first in range(begin // BLOCK * BLOCK, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        is_candidate = (column >= begin) & (column < end)
        value = sortable(tl.load(shares_ptr + column, mask=is_candidate, other=0.0))
        lowest = tl.minimum(lowest, tl.min(tl.where(is_candidate, value, 0xFFFFFFFF)))
        highest = tl.maximum(highest, tl.max(tl.where(is_candidate, value, 0)))
    write_largest(shares_ptr, lowest, highest, k, begin, end, end, pages_ptr, written_ptr, None, BLOCK)
    tl.debug_barrier()
    tl.store(shares_ptr + held, own, mask=is_held)
    tl.debug_barrier()  # others read what was written
    return tl.sum(tl.exp(own))


@triton.jit(
    do_not_specialize=["scores_row_stride", "scores_group_stride", "page_table_stride", "num_columns"],
    do_not_specialize_on_alignment=["flag_count_ptr", "is_due_ptr", "pace_ptr"],
)
def _correct_windows_kernel(
    scores_ptr,
    queries_ptr,
    rows_ptr,
    slots_ptr,
    page_table_ptr,
    table_ptr,
    host_kv_ptr,
    block_kv_ptr,
    pages_ptr,
    num_pages_ptr,
    num_pages_next_ptr,
    budget_pages_ptr,
    front_budget_pages_ptr,
    step_ptr,
    windows_ptr,
    flag_rows_ptr,
    flag_count_ptr,
    is_flagged_ptr,
    counters_ptr,
    is_due_ptr,
    pace_ptr,
    scale,
    gate,
    hysteresis,
    num_columns,
    scores_row_stride,
    scores_group_stride,
    query_row_stride,
    query_head_stride,
    query_group_stride,
    page_table_stride,
    pages_stride,
    host_page_stride,
    host_head_stride,
    windows_half_stride,
    windows_row_stride,
    windows_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CODEC: tl.constexpr,
    WIDTH: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    NUM_LOOKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    MAX_INTERVAL: tl.constexpr,
):
    let_the_next_kernel_come()
    wait_for_the_kernel_before()
    row = tl.program_id(0)
    request, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    num_pages = tl.load(num_pages_ptr + request).to(tl.int32)
    num_next = tl.load(num_pages_next_ptr + request).to(tl.int32)
    budget = tl.load(budget_pages_ptr + row).to(tl.int32)
    front_budget = tl.load(front_budget_pages_ptr + row).to(tl.int32)
    is_judged = (num_pages > front_budget) & (num_next > budget)
    if not is_judged:
        tl.store(is_flagged_ptr + row, False)
    if num_next <= budget:
        return
    request_row = tl.load(rows_ptr + request)
    windows_ptr += request_row * windows_row_stride + head.to(tl.int64) * windows_head_stride
    step, column = tl.load(step_ptr), tl.arange(0, BLOCK_W)
    front_ptrs = windows_ptr + step % 2 * windows_half_stride + column
    back_ptr = windows_ptr + (step + 1) % 2 * windows_half_stride
    if is_due_ptr is not None:
        is_due = tl.load(is_due_ptr + row)
        if not is_due:
            in_window = column < WIDTH
            tl.store(back_ptr + column, tl.load(front_ptrs, mask=in_window), mask=in_window)
            tl.store(is_flagged_ptr + row, False)
            return
    scores_ptr += row.to(tl.int64) * scores_row_stride
    if pages_ptr is not None:
        pages_ptr += row.to(tl.int64) * pages_stride
    share_row(
        scores_ptr,
        queries_ptr,
        rows_ptr,
        slots_ptr,
        page_table_ptr,
        table_ptr,
        host_kv_ptr,
        block_kv_ptr,
        pages_ptr,
        row,
        num_pages - 1,
        scale,
        num_columns,
        scores_group_stride,
        query_row_stride,
        query_head_stride,
        query_group_stride,
        page_table_stride,
        host_page_stride,
        host_head_stride,
        NUM_KV_HEADS,
        GROUP_SIZE,
        HEAD_DIM,
        PAGE_SIZE,
        BLOCK,
        BLOCK_G,
        BLOCK_D,
        CODEC,
    )
    tl.debug_barrier()  # threads read what others have written

    is_calm = tl.full((), False, tl.int1)
    # Where both steps choose among the same pages they choose the same: what the first turn takes is favoured then.
    is_one_turn = is_judged & (num_next == num_pages) & (budget == front_budget)
    for turn in range(1 - is_judged.to(tl.int32), 2 - is_one_turn.to(tl.int32)):
        own_budget = tl.where(turn == 0, front_budget, budget)
        past_candidates = tl.where(turn == 0, num_pages, num_next) - RECENT
        end = past_candidates
        held = tl.load(front_ptrs, mask=column < WIDTH, other=-1)
        if pages_ptr is not None:
            end = num_below(pages_ptr, past_candidates, num_columns, BLOCK)
            held = columns_of(held, pages_ptr, SINK, end, NUM_LOOKS)
        is_held = (held >= SINK) & (held < end)
        k = own_budget - SINK - RECENT
        held_share = _select(scores_ptr, held, is_held, k, SINK, end, hysteresis, pages_ptr, back_ptr + SINK, BLOCK)
        if turn == 0:
            is_selected = (column >= SINK) & (column < own_budget - RECENT)
            best = tl.load(back_ptr + column, mask=is_selected, other=-1)
            best_column = best
            if pages_ptr is not None:
                best_column = columns_of(best, pages_ptr, SINK, end, NUM_LOOKS)
            is_best = (best_column >= SINK) & (best_column < end)
            best_share = tl.sum(tl.exp(tl.load(scores_ptr + best_column, mask=is_best, other=float("-inf"))))
            lost = best_share - held_share
            is_flagged, is_calm = lost > gate, lost <= _CALM * gate
            tl.store(is_flagged_ptr + row, is_flagged)
            if is_flagged:
                tl.store(front_ptrs, best, mask=is_selected)
                tl.store(flag_rows_ptr + tl.atomic_add(flag_count_ptr, 1, sem="relaxed"), row)
                tl.atomic_add(counters_ptr + _FLAGGED_ROWS, 1, sem="relaxed")
            tl.debug_barrier()  # the next turn reads the front and overwrites the back

    window = tl.where(column < SINK, column, column + num_next - budget)
    is_selected = (column >= SINK) & (column < budget - RECENT)
    tl.store(back_ptr + column, tl.where(column < budget, window, -1), mask=(column < WIDTH) & ~is_selected)
    if pace_ptr is not None:
        pace_ptr += (request_row * NUM_KV_HEADS + head) * 2
        interval = tl.where(is_calm, tl.minimum(2 * tl.load(pace_ptr), MAX_INTERVAL), 1)
        tl.store(pace_ptr, interval)
        tl.store(pace_ptr + 1, interval - 1)


def correct_windows(
    scores: torch.Tensor,
    queries: torch.Tensor,
    store: PageStore,
    batch: Batch,
    front_budget_pages: torch.Tensor,
    scale: float,
    gate: float,
    sink_pages: int,
    recent_pages: int,
    windows: torch.Tensor,
    flags: FlagList,
    counters: torch.Tensor,
    hysteresis: float = 0.0,
    pages: torch.Tensor | None = None,
    due: FlagList | None = None,
    pace: torch.Tensor | None = None,
    max_interval: int = 1,
) -> None:
    """See `freekv_kernels.correct_windows`. The grid depends on shapes only, and nothing is allocated."""
    num_columns = scores.shape[2]
    block = min(1024, triton.next_power_of_2(num_columns))
    tensors, sizes, constants = tensors_and_sizes(scores, queries, store, batch, pages, block)
    _correct_windows_kernel[(len(scores),)](
        *tensors,
        batch.num_pages,
        batch.num_pages_next,
        batch.budget_pages,
        front_budget_pages,
        batch.step,
        windows,
        flags.rows,
        flags.count,
        flags.is_flagged,
        counters,
        None if due is None else due.is_flagged,
        pace,
        scale,
        gate,
        hysteresis,
        *sizes,
        *windows.stride()[:3],
        **constants,
        WIDTH=windows.shape[3],
        SINK=sink_pages,
        RECENT=recent_pages,
        NUM_LOOKS=num_columns.bit_length(),
        BLOCK_W=triton.next_power_of_2(windows.shape[3]),
        MAX_INTERVAL=max_interval,
        num_warps=8,
        maxnreg=_MAX_REGISTERS,
        **dependent_launch(),
    )
