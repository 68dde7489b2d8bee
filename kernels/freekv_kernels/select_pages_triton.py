"""Select the pages of a window: Triton kernel of `select_pages`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.ranks_triton import LOG2_E, columns_of, load_scores, num_below, sortable, write_largest
from freekv_kernels.select_pages import check_pooling
from freekv_kernels.tables import Batch, FlagList, Half

BOTH = tl.constexpr(int(Half.BOTH))


@triton.jit(do_not_specialize=["scores_row_stride", "scores_group_stride", "num_columns"])
def _select_pages_kernel(
    scores_ptr,
    rows_ptr,
    half_pages_ptr,
    budget_pages_ptr,
    step_ptr,
    flag_rows_ptr,
    flag_count_ptr,
    windows_ptr,
    pages_ptr,
    scale,
    hysteresis,
    num_columns,
    pages_stride,
    scores_row_stride,
    scores_group_stride,
    windows_half_stride,
    windows_row_stride,
    windows_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    HALF: tl.constexpr,
    HAS_HYSTERESIS: tl.constexpr,
    NUM_LOOKS: tl.constexpr,
    POOLING: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ALIGN: tl.constexpr,
):
    row = tl.program_id(0)
    if flag_rows_ptr is not None:
        if row >= tl.load(flag_count_ptr):
            return
        row = tl.load(flag_rows_ptr + row)
    request, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    num_pages = tl.load(half_pages_ptr + request).to(tl.int32)
    budget = tl.load(budget_pages_ptr + row).to(tl.int32)
    is_over = num_pages > budget
    if HALF != BOTH and not is_over:
        return
    NUM_HALVES: tl.constexpr = 2 if HALF == BOTH else 1
    half = (tl.load(step_ptr) + HALF) % 2
    windows_ptr += tl.load(rows_ptr + request) * windows_row_stride + head.to(tl.int64) * windows_head_stride

    # Everything but the best pages; within the budget, that is every page.
    column = tl.arange(0, BLOCK_W)
    num_selected = tl.minimum(num_pages, budget)
    window = tl.where(column < SINK, column, column + num_pages - num_selected)
    window = tl.where(column < num_selected, window, -1)
    is_chosen = is_over & (column >= SINK) & (column < budget - RECENT)
    for i in tl.static_range(NUM_HALVES):
        window_ptr = windows_ptr + (half + i) % 2 * windows_half_stride
        tl.store(window_ptr + column, window, mask=(column < WIDTH) & ~is_chosen)
    if not is_over:
        return
    IS_POOLED: tl.constexpr = GROUP_SIZE == 1 and POOLING == "mean"  # then the scores are the pooled ones
    begin, end, k = SINK, num_pages - RECENT, budget - SINK - RECENT  # columns, which are pages where none are listed
    if pages_ptr is not None:
        pages_ptr += row.to(tl.int64) * pages_stride
        end = num_below(pages_ptr, num_pages - RECENT, num_columns, BLOCK)
    if HAS_HYSTERESIS:
        # Those among the candidates; sink and recent pages are written already, and are none.
        held = tl.load(
            windows_ptr + tl.load(step_ptr) % 2 * windows_half_stride + column, mask=column < WIDTH, other=-1
        )
        if pages_ptr is not None:
            held = columns_of(held, pages_ptr, begin, end, NUM_LOOKS)
        is_held = (held >= begin) & (held < end)

    scores_row_stride = scores_row_stride // ALIGN * ALIGN  # the same number, and the compiler sees what divides it
    scores_group_stride = scores_group_stride // ALIGN * ALIGN
    scores_ptr += row.to(tl.int64) * scores_row_stride
    readable_end = tl.cdiv(end, ALIGN) * ALIGN
    BEGIN_BLOCK: tl.constexpr = SINK // BLOCK * BLOCK  # so that the first block has a candidate
    is_head = tl.arange(0, BLOCK_G) < GROUP_SIZE

    if POOLING != "mean":  # of base 2 logarithms, which are cheaper and in the same order
        log2_scale = scale * LOG2_E
        peak = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        for first in range(BEGIN_BLOCK, end, BLOCK):
            page = first + tl.arange(0, BLOCK)
            x = load_scores(scores_ptr, scores_group_stride, page, begin, end, readable_end, GROUP_SIZE, BLOCK_G)
            x *= log2_scale
            peak_before, peak = peak, tl.maximum(peak, tl.max(x, 1))
            total = total * tl.exp2(peak_before - peak) + tl.sum(tl.exp2(x - peak[:, None]), 1)
        log_total = tl.where(is_head, peak + tl.log2(total), float("inf"))

    lowest, highest = tl.full((), 0xFFFFFFFF, tl.uint32), tl.full((), 0, tl.uint32)
    for first in range(BEGIN_BLOCK, end, BLOCK):
        page = first + tl.arange(0, BLOCK)
        x = load_scores(scores_ptr, scores_group_stride, page, begin, end, readable_end, GROUP_SIZE, BLOCK_G)
        if POOLING == "mean":
            pooled = tl.sum(tl.where(is_head[:, None], x, 0.0), 0) / GROUP_SIZE
        else:
            x = x * log2_scale - log_total[:, None]
            pooled = tl.max(x, 0)
            if POOLING != "max":
                pooled += tl.log2(tl.sum(tl.exp2(x - pooled[None, :]), 0))
        is_candidate = (page >= begin) & (page < end)
        lowest = tl.minimum(lowest, tl.min(tl.where(is_candidate, sortable(pooled), 0xFFFFFFFF)))
        highest = tl.maximum(highest, tl.max(tl.where(is_candidate, sortable(pooled), 0)))
        if not IS_POOLED:
            tl.debug_barrier()  # other threads may still read what is overwritten
            tl.store(scores_ptr + page, pooled, mask=page < readable_end)
    tl.debug_barrier()  # threads read what others have written
    if HAS_HYSTERESIS:
        favoured = tl.load(scores_ptr + held, mask=is_held, other=0.0) + hysteresis
        highest = tl.maximum(highest, tl.max(tl.where(is_held, sortable(favoured), 0)))
        tl.debug_barrier()
        tl.store(scores_ptr + held, favoured, mask=is_held)
        tl.debug_barrier()

    written_ptr = windows_ptr + half * windows_half_stride + SINK
    also_written_ptr = windows_ptr + (1 - half) * windows_half_stride + SINK if HALF == BOTH else None
    write_largest(
        scores_ptr, lowest, highest, k, begin, end, readable_end, pages_ptr, written_ptr, also_written_ptr, BLOCK
    )
    if HAS_HYSTERESIS and IS_POOLED:  # they stay, but for rounding
        favoured = tl.load(scores_ptr + held, mask=is_held, other=0.0)
        tl.debug_barrier()
        tl.store(scores_ptr + held, favoured - hysteresis, mask=is_held)


def select_pages(
    scores: torch.Tensor,
    batch: Batch,
    half: Half,
    sink_pages: int,
    recent_pages: int,
    pooling: str,
    windows: torch.Tensor,
    flags: FlagList | None = None,
    scale: float = 1.0,
    hysteresis: float = 0.0,
    pages: torch.Tensor | None = None,
) -> None:
    """See `freekv_kernels.select_pages`.

    One program per row; nothing is allocated. Blocks of columns are walked, and their pooled scores kept in place of
    the scores of the group's first head. Equal scores at the threshold are taken in page order.
    """
    check_pooling(pooling)
    num_rows, group_size, num_columns = scores.shape
    block_g = triton.next_power_of_2(group_size)
    # A decode step reads past a request's pages, so that accesses can be of 16 bytes. Prompts differ in length.
    is_aligned = half != Half.BOTH and all(n % 4 == 0 for n in (*scores.stride()[:2], num_columns))
    _select_pages_kernel[(num_rows,)](
        scores,
        batch.rows,
        batch.num_pages_at(half),
        batch.budget_pages,
        batch.step,
        None if flags is None else flags.rows,
        None if flags is None else flags.count,
        windows,
        pages,
        1.0 if pooling == "softmax" else scale,
        hysteresis if pooling == "mean" else hysteresis * LOG2_E.value,
        num_columns,
        0 if pages is None else pages.stride(0),
        *scores.stride()[:2],
        *windows.stride()[:3],
        NUM_KV_HEADS=windows.shape[2],
        GROUP_SIZE=group_size,
        WIDTH=windows.shape[3],
        SINK=sink_pages,
        RECENT=recent_pages,
        HALF=int(half),
        HAS_HYSTERESIS=hysteresis > 0 and half != Half.BOTH,
        NUM_LOOKS=num_columns.bit_length(),
        POOLING="softmax" if pooling == "scaled" else pooling,
        # Several rows share a multiprocessor, and a short row walks no lanes that it does not fill.
        BLOCK=min(1024, 4096 // block_g, triton.next_power_of_2(num_columns)),
        BLOCK_G=block_g,
        BLOCK_W=triton.next_power_of_2(windows.shape[3]),
        ALIGN=4 if is_aligned else 1,
        num_warps=8,
    )
