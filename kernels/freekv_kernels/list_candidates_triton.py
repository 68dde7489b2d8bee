"""Kernels of list_candidates: many programs score the groups of all rows, then one for each row lists its pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.fp8_triton import decode_fp8
from freekv_kernels.list_candidates import HELD_BONUS, WIDTH_SHARE, groups_of
from freekv_kernels.ranks_triton import LOG2_E, kth_largest, load_scores, sortable
from freekv_kernels.tables import GROUP_PAGES, Batch, Half

_GROUP_PAGES = tl.constexpr(GROUP_PAGES)
_WIDTH_SHARE = tl.constexpr(WIDTH_SHARE)
_HELD_BONUS = tl.constexpr(HELD_BONUS)
NUM_PROGRAMS = 1024  # as many as of score_pages


@triton.jit
def _is_scored(row, half_pages_ptr, budget_pages_ptr, num_pages_ptr, num_columns, NUM_KV_HEADS: tl.constexpr):
    """Whether a row is over its budget and its pages are more than a list holds."""
    is_over = tl.load(half_pages_ptr + row // NUM_KV_HEADS) > tl.load(budget_pages_ptr + row)
    return is_over & (tl.load(num_pages_ptr + row // NUM_KV_HEADS) > num_columns)


@triton.jit(
    do_not_specialize=["page_table_stride", "scores_row_stride", "scores_group_stride", "num_rows", "num_columns"]
)
def _score_groups_kernel(
    queries_ptr,
    summary_ptr,
    rows_ptr,
    page_table_ptr,
    num_pages_ptr,
    half_pages_ptr,
    budget_pages_ptr,
    scores_ptr,
    scale,
    query_row_stride,
    query_head_stride,
    query_group_stride,
    page_table_stride,
    scores_row_stride,
    scores_group_stride,
    num_rows,
    num_columns,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BEGIN: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, split = tl.program_id(0) % num_rows, tl.program_id(0) // num_rows
    num_splits = tl.num_programs(0) // num_rows
    if split >= num_splits:
        return
    if not _is_scored(row, half_pages_ptr, budget_pages_ptr, num_pages_ptr, num_columns, NUM_KV_HEADS):
        return
    request, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    end = (tl.load(num_pages_ptr + request).to(tl.int32) - RECENT) // _GROUP_PAGES

    g, dim = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    is_dim, is_head = dim < HEAD_DIM, g < GROUP_SIZE
    query_ptr = queries_ptr + tl.load(rows_ptr + request) * query_row_stride + head * query_head_stride
    query_ptrs = query_ptr + g[:, None] * query_group_stride + dim[None, :]
    q = tl.load(query_ptrs, is_head[:, None] & is_dim[None, :], other=0.0).to(tl.float32) / 2
    q_for_lo, q_for_hi = q - _WIDTH_SHARE * tl.abs(q), q + _WIDTH_SHARE * tl.abs(q)

    page_table_ptr += request.to(tl.int64) * page_table_stride
    scores_ptr += row.to(tl.int64) * scores_row_stride
    for first in range(BEGIN + split * BLOCK_N, end, num_splits * BLOCK_N):
        group = first + tl.arange(0, BLOCK_N)
        is_group = group < end
        page = tl.load(page_table_ptr + group * _GROUP_PAGES + (_GROUP_PAGES - 1), is_group, other=0)
        bounds_ptrs = summary_ptr + (page * NUM_KV_HEADS + head)[:, None] * (2 * HEAD_DIM) + dim[None, :]
        is_bound = is_group[:, None] & is_dim[None, :]
        lo = decode_fp8(tl.load(bounds_ptrs, is_bound, other=0)).to(tl.float32)
        hi = decode_fp8(tl.load(bounds_ptrs + HEAD_DIM, is_bound, other=0)).to(tl.float32)
        scores = tl.dot(q_for_lo, lo.T, input_precision=PRECISION)
        scores = tl.dot(q_for_hi, hi.T, scores, input_precision=PRECISION)
        score_ptrs = scores_ptr + g[:, None] * scores_group_stride + group[None, :]
        tl.store(score_ptrs, scale * scores, is_head[:, None] & is_group[None, :])


@triton.jit(do_not_specialize=["candidates", "pages_stride", "scores_row_stride", "scores_group_stride", "num_columns"])
def _list_candidates_kernel(
    scores_ptr,
    num_pages_ptr,
    half_pages_ptr,
    budget_pages_ptr,
    rows_ptr,
    step_ptr,
    windows_ptr,
    pages_ptr,
    candidates,
    pages_stride,
    scores_row_stride,
    scores_group_stride,
    num_columns,
    windows_half_stride,
    windows_row_stride,
    windows_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_FRONT: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    BEGIN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0)
    request = row // NUM_KV_HEADS
    budget = tl.load(budget_pages_ptr + row).to(tl.int32)
    if tl.load(half_pages_ptr + request) <= budget:
        return
    num_pages = tl.load(num_pages_ptr + request).to(tl.int32)
    pages_ptr += row.to(tl.int64) * pages_stride
    column = tl.arange(0, BLOCK_L)
    if num_pages <= num_columns:
        tl.store(pages_ptr + column, tl.where(column < num_pages, column, -1), column < num_columns)
        return

    # What lies before and behind the groups to choose from, and -1.
    end = (num_pages - RECENT) // _GROUP_PAGES
    num_wanted = (candidates * (budget - SINK - RECENT) + _GROUP_PAGES - 1) // _GROUP_PAGES
    k = tl.minimum(num_wanted, (num_columns - num_pages + _GROUP_PAGES * (end - BEGIN)) // _GROUP_PAGES)
    behind = (BEGIN + k) * _GROUP_PAGES  # column of the first page behind
    latest = column - behind + end * _GROUP_PAGES
    page = tl.where(column < BEGIN * _GROUP_PAGES, column, tl.where(latest < num_pages, latest, -1))
    is_between = (column >= BEGIN * _GROUP_PAGES) & (column < behind)
    tl.store(pages_ptr + column, page, (column < num_columns) & ~is_between)
    if k == 0:
        return

    scores_ptr += row.to(tl.int64) * scores_row_stride
    is_head = tl.arange(0, BLOCK_G) < GROUP_SIZE
    peak = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    for first in range(BEGIN // BLOCK * BLOCK, end, BLOCK):
        group = first + tl.arange(0, BLOCK)
        x = load_scores(scores_ptr, scores_group_stride, group, BEGIN, end, end, GROUP_SIZE, BLOCK_G) * LOG2_E
        peak_before, peak = peak, tl.maximum(peak, tl.max(x, 1))
        total = total * tl.exp2(peak_before - peak) + tl.sum(tl.exp2(x - peak[:, None]), 1)
    log_total = tl.where(is_head, peak + tl.log2(total), float("inf"))

    lowest, highest = tl.full((), 0xFFFFFFFF, tl.uint32), tl.full((), 0, tl.uint32)
    for first in range(BEGIN // BLOCK * BLOCK, end, BLOCK):
        group = first + tl.arange(0, BLOCK)
        x = load_scores(scores_ptr, scores_group_stride, group, BEGIN, end, end, GROUP_SIZE, BLOCK_G) * LOG2_E
        x -= log_total[:, None]
        pooled = tl.max(x, 0)
        pooled += tl.log2(tl.sum(tl.exp2(x - pooled[None, :]), 0))
        is_candidate = (group >= BEGIN) & (group < end)
        lowest = tl.minimum(lowest, tl.min(tl.where(is_candidate, sortable(pooled), 0xFFFFFFFF)))
        highest = tl.maximum(highest, tl.max(tl.where(is_candidate, sortable(pooled), 0)))
        tl.debug_barrier()  # other threads may still read what is overwritten
        tl.store(scores_ptr + group, pooled, is_candidate)
    tl.debug_barrier()  # threads read what others have written
    if HAS_FRONT:
        entry = tl.arange(0, BLOCK_W)
        windows_ptr += tl.load(rows_ptr + request) * windows_row_stride + row % NUM_KV_HEADS * windows_head_stride
        front_ptr = windows_ptr + tl.load(step_ptr) % 2 * windows_half_stride
        held_page = tl.load(front_ptr + entry, entry < WIDTH, other=-1)
        held = held_page // _GROUP_PAGES
        is_held = (held_page >= 0) & (held >= BEGIN) & (held < end)
        favoured = tl.load(scores_ptr + held, is_held, other=0.0) + _HELD_BONUS
        highest = tl.maximum(highest, tl.max(tl.where(is_held, sortable(favoured), 0)))
        tl.debug_barrier()  # two pages of a group find the same
        tl.store(scores_ptr + held, favoured, is_held)
        tl.debug_barrier()
    threshold, num_ties = kth_largest(scores_ptr, lowest, highest, k, BEGIN, end, end, BLOCK)

    # One prefix sum counts both: groups above the threshold in the upper half, groups that equal it in the lower.
    counted = tl.full((), 0, tl.int64)
    member = tl.arange(0, _GROUP_PAGES)[None, :]
    for first in range(BEGIN // BLOCK * BLOCK, end, BLOCK):
        group = first + tl.arange(0, BLOCK)
        is_candidate = (group >= BEGIN) & (group < end)
        value = sortable(tl.load(scores_ptr + group, is_candidate, other=0.0))
        is_above, is_tie = is_candidate & (value > threshold), is_candidate & (value == threshold)
        ones = (is_above.to(tl.int64) << 32) + is_tie.to(tl.int64)
        before = counted + tl.cumsum(ones) - ones
        above_before, ties_before = (before >> 32).to(tl.int32), before.to(tl.int32)
        rank = BEGIN + above_before + tl.minimum(ties_before, num_ties)
        is_best = is_above | (is_tie & (ties_before < num_ties))
        page_ptrs = pages_ptr + rank[:, None] * _GROUP_PAGES + member
        tl.store(page_ptrs, group[:, None] * _GROUP_PAGES + member, is_best[:, None] & (member >= 0))
        counted += tl.sum(ones)


def list_candidates(
    queries: torch.Tensor,
    summary: torch.Tensor,
    batch: Batch,
    half: Half,
    scale: float,
    candidates: int,
    sink_pages: int,
    recent_pages: int,
    windows: torch.Tensor,
    pages: torch.Tensor,
    scores: torch.Tensor | None = None,
) -> None:
    """See `freekv_kernels.list_candidates`. Two launches, whose grids depend on shapes only; with `scores` nothing is
    allocated.
    """
    (num_rows, num_columns), (num_kv_heads, _, head_dim) = pages.shape, summary.shape[1:]
    max_groups, group_size = batch.page_table.shape[1] // GROUP_PAGES, queries.shape[2]
    if scores is None:
        scores = queries.new_empty((num_rows, group_size, max_groups), dtype=torch.float32)
    lengths = batch.num_pages, batch.num_pages_at(half), batch.budget_pages
    sizes = {"NUM_KV_HEADS": num_kv_heads, "GROUP_SIZE": group_size, "RECENT": recent_pages}
    sizes["BEGIN"] = groups_of(sink_pages)
    block_d, block_g = triton.next_power_of_2(head_dim), triton.next_power_of_2(group_size)
    block_n = max(16, 8192 // block_d)  # 8 KiB of minima
    num_programs = min(num_rows * triton.cdiv(max(max_groups, 1), block_n), max(num_rows, NUM_PROGRAMS))
    _score_groups_kernel[(num_programs,)](
        queries,
        summary,
        batch.rows,
        batch.page_table,
        *lengths,
        scores,
        scale,
        *queries.stride()[:3],
        batch.page_table.stride(0),
        *scores.stride()[:2],
        num_rows,
        num_columns,
        **sizes,
        HEAD_DIM=head_dim,
        BLOCK_G=16,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        # A quarter or three of a 16-bit number, times 4 bits of a bound: exact in tf32, and summed in fp32.
        PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
        num_warps=4,
    )
    _list_candidates_kernel[(num_rows,)](
        scores,
        *lengths,
        batch.rows,
        batch.step,
        windows,
        pages,
        candidates,
        pages.stride(0),
        *scores.stride()[:2],
        num_columns,
        *windows.stride()[:3],
        **sizes,
        WIDTH=windows.shape[3],
        HAS_FRONT=half != Half.BOTH,
        SINK=sink_pages,
        BLOCK_G=block_g,
        BLOCK=512,
        BLOCK_L=triton.next_power_of_2(num_columns),
        BLOCK_W=triton.next_power_of_2(windows.shape[3]),
        num_warps=8,
    )
