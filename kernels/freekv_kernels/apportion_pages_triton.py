"""Kernel of apportion_pages: one program per request, which bisects shares for all KV heads at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.tables import Batch, Half

_LOWEST, _HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit
def _tally(
    shares_ptr,
    shares_stride,
    pages_ptr,
    pages_stride,
    bound,
    head,
    is_open,
    begin,
    end,
    num_columns,
    BLOCK: tl.constexpr,
):
    """How many candidates of each head have a share of at least its bound, and their shares' sum.

    Bounds are shares as int32 in the same order.
    """
    count, mass = tl.zeros(head.shape, tl.int32), tl.zeros(head.shape, tl.float32)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        page = tl.broadcast_to(column[None, :], (head.shape[0], BLOCK))
        is_read = is_open[:, None] & (column < num_columns)[None, :]
        if pages_ptr is not None:
            page = tl.load(pages_ptr + head[:, None] * pages_stride + column[None, :], mask=is_read, other=-1)
        is_read &= (page >= begin) & (page < end)
        share = tl.load(shares_ptr + head[:, None] * shares_stride + column[None, :], mask=is_read, other=float("-inf"))
        bits = share.to(tl.int32, bitcast=True)
        is_in = is_read & ((bits ^ tl.where(bits < 0, 0x7FFFFFFF, 0)) >= bound[:, None])
        count += tl.sum(is_in.to(tl.int32), 1)
        mass += tl.sum(tl.where(is_in, tl.exp(share), 0.0), 1)
    return count, mass


@triton.jit(
    do_not_specialize=["shares_stride", "num_columns"],
    do_not_specialize_on_alignment=["row_budgets_ptr"],
)
def _apportion_pages_kernel(
    shares_ptr,
    rows_ptr,
    half_pages_ptr,
    own_budgets_ptr,
    masses_ptr,
    pages_ptr,
    budget_pages_ptr,
    row_budgets_ptr,
    num_columns,
    shares_stride,
    pages_stride,
    NUM_KV_HEADS: tl.constexpr,
    TIMES: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    request, head = tl.program_id(0), tl.arange(0, BLOCK_H)
    is_head = head < NUM_KV_HEADS
    row = tl.load(rows_ptr + request)
    num_pages = tl.load(half_pages_ptr + request).to(tl.int32)
    own_budget = tl.load(own_budgets_ptr + request * NUM_KV_HEADS + head, mask=is_head, other=0).to(tl.int32)
    mass = tl.load(masses_ptr + row)
    is_open = is_head & (tl.where(mass > 0.0, num_pages, 0) > own_budget)
    FIXED: tl.constexpr = SINK + RECENT
    first_row = request.to(tl.int64) * NUM_KV_HEADS
    shares_ptr += first_row * shares_stride
    end, last = num_pages - RECENT, num_columns
    if pages_ptr is None:
        last = tl.minimum(end, num_columns)
    else:
        pages_ptr += first_row * pages_stride
    if tl.max(is_open.to(tl.int32)) == 0:
        last = 0

    # Per head the largest bound above which there is enough; between low and high lies what is still to be decided.
    low = tl.full((BLOCK_H,), _LOWEST, tl.int64)
    high = tl.full((BLOCK_H,), _HIGHEST, tl.int64)
    count_low, mass_low = _tally(
        shares_ptr, shares_stride, pages_ptr, pages_stride, low, head, is_open, SINK, end, last, BLOCK
    )
    target = mass_low - (1 - mass)
    num_candidates = count_low
    count_high, mass_high = tl.zeros((BLOCK_H,), tl.int32), tl.zeros((BLOCK_H,), tl.float32)
    is_searched = target > 0
    while tl.max((is_searched & (count_low - count_high > 1) & (high - low > 1)).to(tl.int32)) > 0:
        middle = (low + high) // 2
        count, found = _tally(
            shares_ptr, shares_stride, pages_ptr, pages_stride, middle, head, is_open, SINK, end, last, BLOCK
        )
        is_enough = found >= target
        low, high = tl.where(is_enough, middle, low), tl.where(is_enough, high, middle)
        count_low, count_high = tl.where(is_enough, count, count_low), tl.where(is_enough, count_high, count)
        mass_low, mass_high = tl.where(is_enough, found, mass_low), tl.where(is_enough, mass_high, found)
    # What is left between them is one page, or pages of equal shares.
    num_left = count_low - count_high
    share_of_each = tl.where(num_left > 1, (mass_low - mass_high) / tl.maximum(num_left, 1), 1.0)
    num_taken = tl.minimum(tl.ceil((target - mass_high) / share_of_each), num_left.to(tl.float32)).to(tl.int32)
    num_wanted = tl.where(is_searched, count_high + tl.where(num_left > 1, num_taken, num_left), 1)

    room_of_head = tl.where(is_open, own_budget - FIXED, 0)
    most = tl.minimum(tl.minimum(num_pages - FIXED - 1, TIMES * room_of_head), num_candidates)
    room, least = tl.sum(room_of_head), tl.minimum(room_of_head, 1)
    num_wanted = tl.where(is_open, tl.minimum(num_wanted, most), 0)

    # One bound for all heads, of the request's shares, where they want more than there is room for.
    num_kept, num_more = least, num_wanted
    below = tl.full((), _LOWEST, tl.int64)
    above = tl.full((), _HIGHEST, tl.int64)
    if tl.sum(num_wanted) <= room:
        num_kept = num_wanted
    while (tl.sum(num_kept) < room) & (tl.sum(num_more) > room) & (above - below > 1):
        middle = (below + above) // 2
        count, _ = _tally(
            shares_ptr,
            shares_stride,
            pages_ptr,
            pages_stride,
            tl.full((BLOCK_H,), 0, tl.int64) + middle,
            head,
            is_open,
            SINK,
            end,
            last,
            BLOCK,
        )
        kept = tl.maximum(tl.minimum(num_wanted, count), least)
        fits = tl.sum(kept) <= room
        num_kept, num_more = tl.where(fits, kept, num_kept), tl.where(fits, num_more, kept)
        below, above = tl.where(fits, below, middle), tl.where(fits, middle, above)
    # Of equal shares, those of the first heads.
    num_equal = num_more - num_kept
    left = room - tl.sum(num_kept)
    num_kept += tl.minimum(tl.maximum(left - (tl.cumsum(num_equal, 0) - num_equal), 0), num_equal)

    budget = tl.where(is_open, FIXED + num_kept, own_budget).to(tl.int64)
    tl.store(budget_pages_ptr + first_row + head, budget, mask=is_head)
    tl.store(row_budgets_ptr + row * NUM_KV_HEADS + head, budget, mask=is_head)


def apportion_pages(
    shares: torch.Tensor,
    batch: Batch,
    half: Half,
    masses: torch.Tensor,
    sink_pages: int,
    recent_pages: int,
    times: int,
    budget_pages: torch.Tensor,
    row_budgets: torch.Tensor,
    pages: torch.Tensor | None = None,
) -> None:
    """See `freekv_kernels.apportion_pages`. The grid depends on shapes only, and nothing is allocated.

    A pass over the shares halves what is still to be decided: about as many passes as a list of pages has halves.
    """
    num_kv_heads, num_columns = batch.budget_pages.shape[1], shares.shape[2]
    block_h = triton.next_power_of_2(num_kv_heads)
    _apportion_pages_kernel[(len(batch.rows),)](
        shares,
        batch.rows,
        batch.num_pages_at(half),
        batch.budget_pages,
        masses,
        pages,
        budget_pages,
        row_budgets,
        num_columns,
        shares.stride(0),
        0 if pages is None else pages.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        TIMES=times,
        SINK=sink_pages,
        RECENT=recent_pages,
        BLOCK=max(16, 4096 // block_h),
        BLOCK_H=block_h,
        num_warps=8,
    )
