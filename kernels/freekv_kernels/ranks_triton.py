"""What kernels share that rank the columns of a row: their scores, the k-th largest, and lists of pages."""

from __future__ import annotations

import triton
import triton.language as tl

BIN_BITS = tl.constexpr(5)  # a warp holds the bins of a pass, one in each lane
MAX_INT = tl.constexpr(2**31 - 1)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_scores(
    scores_ptr, group_stride, page, begin, end, readable_end, GROUP_SIZE: tl.constexpr, BLOCK_G: tl.constexpr
):
    """Load the scores of a block of pages, -inf but for the candidates begin to end - 1."""
    group = tl.arange(0, BLOCK_G)[:, None]
    is_readable = (group < GROUP_SIZE) & (page < readable_end)[None, :]
    scores = tl.load(scores_ptr + group * group_stride + page[None, :], mask=is_readable, other=float("-inf"))
    return tl.where(((page >= begin) & (page < end))[None, :], scores, float("-inf"))


@triton.jit
def sortable(pooled):
    """Map fp32 to uint32 in the same order."""
    bits = pooled.to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000)


@triton.jit
def kth_largest(pooled_ptr, lowest, highest, k, begin, end, readable_end, BLOCK: tl.constexpr):
    """Find the value of rank k, and how many pages with that value belong to the k largest.

    A pass counts the values of an interval in 2**BIN_BITS bins; the bin of rank k is the next interval, until all of
    its values belong. About 3 passes suffice where scores differ, whatever their number; 7 always do.
    """
    NUM_BINS: tl.constexpr = 2**BIN_BITS
    last = highest - lowest  # of the interval, as the offset from its lowest value
    shift = 0
    while (last >> shift) >= NUM_BINS:
        shift += 1
    num_above = 0
    is_found = False
    while not is_found:
        counts = tl.zeros((NUM_BINS,), tl.int32)
        for first in range(begin // BLOCK * BLOCK, end, BLOCK):
            page = first + tl.arange(0, BLOCK)
            value = sortable(tl.load(pooled_ptr + page, mask=page < readable_end, other=0.0))
            is_inside = (page >= begin) & (page < end) & (value >= lowest) & (value - lowest <= last)
            counts += tl.histogram(((value - lowest) >> shift).to(tl.int32), NUM_BINS, mask=is_inside)
        num_reached = num_above + tl.cumsum(counts, reverse=True)  # by taking a bin and all above it
        is_enough = num_reached >= k
        found = tl.sum(is_enough.to(tl.int32)) - 1
        num_above = tl.max(tl.where(is_enough, num_above, num_reached))
        is_found = (shift == 0) | (tl.min(tl.where(is_enough, num_reached, MAX_INT)) == k)
        lowest += found.to(tl.uint32) << shift
        last = (tl.full((), 1, tl.uint32) << shift) - 1
        shift = tl.maximum(shift - BIN_BITS, 0)
    return lowest, k - num_above


@triton.jit
def write_largest(
    pooled_ptr,
    lowest,
    highest,
    k,
    begin,
    end,
    readable_end,
    pages_ptr,
    written_ptr,
    also_written_ptr,
    BLOCK: tl.constexpr,
):
    """Write the pages of the k columns that are largest, ascending; equal ones are taken from the first on."""
    threshold, num_ties = kth_largest(pooled_ptr, lowest, highest, k, begin, end, readable_end, BLOCK)
    # One prefix sum counts both: pages above the threshold in the upper half, pages that equal it in the lower.
    counted = tl.full((), 0, tl.int64)
    for first in range(begin // BLOCK * BLOCK, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = sortable(tl.load(pooled_ptr + column, mask=column < readable_end, other=0.0))
        is_candidate = (column >= begin) & (column < end)
        is_above, is_tie = is_candidate & (value > threshold), is_candidate & (value == threshold)
        ones = (is_above.to(tl.int64) << 32) + is_tie.to(tl.int64)
        before = counted + tl.cumsum(ones) - ones
        above_before, ties_before = (before >> 32).to(tl.int32), before.to(tl.int32)
        rank = above_before + tl.minimum(ties_before, num_ties)
        is_best = is_above | (is_tie & (ties_before < num_ties))
        page = column
        if pages_ptr is not None:
            page = tl.load(pages_ptr + column, mask=is_best, other=-1)
        tl.store(written_ptr + rank, page, mask=is_best)
        if also_written_ptr is not None:
            tl.store(also_written_ptr + rank, page, mask=is_best)
        if first + BLOCK < end:
            counted += tl.sum(ones)


@triton.jit
def num_below(pages_ptr, bound, num_columns, BLOCK: tl.constexpr):
    """How many columns list a page below the bound; the list ascends, and -1 follows."""
    count = tl.full((), 0, tl.int32)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        page = tl.load(pages_ptr + column, mask=column < num_columns, other=-1)
        count += tl.sum(((page >= 0) & (page < bound)).to(tl.int32))
    return count


@triton.jit
def columns_of(page, pages_ptr, begin, end, NUM_LOOKS: tl.constexpr):
    """Columns begin to end - 1 that list these pages, -1 where none does; the list ascends."""
    low, high = page * 0 + begin, page * 0 + end
    for _ in range(NUM_LOOKS):
        middle = (low + high) // 2
        is_before = (low < high) & (tl.load(pages_ptr + middle, mask=low < high, other=0) < page)
        low, high = tl.where(is_before, middle + 1, low), tl.where(is_before, high, middle)
    found = tl.load(pages_ptr + low, mask=low < end, other=-1)
    return tl.where((low < end) & (found == page), low, -1)
