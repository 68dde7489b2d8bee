"""Score pages by their codes, which are operands of the tensor cores as they lie in memory: keys are not decoded.

What the tokens of a page have in common is taken out of the products. With step = (hi - lo) / 2 ** bits:
    q . k' = sum_d (q[d] * step[d]) * code[d]  +  q . (lo + step / 2)
so the query, which is shorter than the codes, is multiplied with the steps, and bounds are operands themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from freekv_kernels.dependent_launch_triton import let_the_next_kernel_come
from freekv_kernels.fp8_triton import decode_fp8
from freekv_kernels.ranks_triton import LOG2_E
from freekv_kernels.score_grid_triton import load_pages, share_of_rows

# The masked bits of a byte, taken for a number of 16-bit floating point, are code * 2 ** -24: exact, and no conversion.
_CODE_UNIT = tl.constexpr(2.0**-24)
_STEP_UNIT = tl.constexpr(2.0**-6)  # keeps query times step within 16 bits, for a product of up to 4 million
_NUM_STAGES = tl.constexpr(4)  # so that a turn's loads are under way while the one before is computed


@triton.jit
def _load_query(query_ptr, group_stride, byte, is_byte, GROUP_SIZE: tl.constexpr, BLOCK_G: tl.constexpr, OPERAND):
    """The channels of the query that one part of the bytes has: ``[BLOCK_B, BLOCK_G]``."""
    group = tl.arange(0, BLOCK_G)
    is_element = is_byte[:, None] & (group < GROUP_SIZE)[None, :]
    return tl.load(query_ptr + group[None, :] * group_stride + byte[:, None], mask=is_element, other=0.0).to(OPERAND)


@triton.jit
def _add_part(tile, q, q_of_part, lo, hi, logits, of_lo, of_hi, PART: tl.constexpr, BITS: tl.constexpr):
    """Add the products with the codes that one part of the bytes has, and those with its channels' bounds."""
    bits = tile.to(tl.uint16) & (((1 << BITS) - 1) << (PART * BITS))
    code = bits.to(tl.float16, bitcast=True) if q.dtype == tl.float16 else bits.to(tl.float32) * _CODE_UNIT
    lo, hi = decode_fp8(lo).to(q.dtype), decode_fp8(hi).to(q.dtype)
    logits = tl.dot(code, q_of_part[None, :, :] * (hi - lo)[:, :, None], logits, input_precision="ieee")
    of_lo = tl.dot(lo, q, of_lo, input_precision="ieee")
    of_hi = tl.dot(hi, q, of_hi, input_precision="ieee")
    return logits, of_lo, of_hi


@triton.jit(
    do_not_specialize=["page_table_stride", "pages_stride", "out_row_stride", "out_group_stride", "num_rows", "width"]
)
def _score_codes_kernel(
    queries_ptr,
    summary_ptr,
    rows_ptr,
    page_table_ptr,
    num_pages_ptr,
    half_pages_ptr,
    budget_pages_ptr,
    flag_rows_ptr,
    flag_count_ptr,
    out_ptr,
    codes_ptr,
    pages_ptr,
    scale,
    query_row_stride,
    query_head_stride,
    query_group_stride,
    summary_page_stride,
    summary_head_stride,
    summary_bound_stride,
    page_table_stride,
    pages_stride,
    out_row_stride,
    out_group_stride,
    num_rows,
    width,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    let_the_next_kernel_come()
    row, split, num_splits = share_of_rows(flag_rows_ptr, flag_count_ptr, num_rows)
    if split >= num_splits:
        return
    request, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    if tl.load(half_pages_ptr + request) <= tl.load(budget_pages_ptr + row):
        return
    end = tl.load(num_pages_ptr + request).to(tl.int32)
    if pages_ptr is not None:
        end = tl.minimum(end, width)
        pages_ptr += row.to(tl.int64) * pages_stride

    byte = tl.arange(0, BLOCK_B)
    is_byte = byte < NUM_BYTES
    query_ptr = queries_ptr + tl.load(rows_ptr + request) * query_row_stride + head * query_head_stride
    q, q_of_parts = (), ()
    for part in tl.static_range(8 // BITS):
        part_ptr = query_ptr + part * NUM_BYTES
        x = _load_query(part_ptr, query_group_stride, byte, is_byte, GROUP_SIZE, BLOCK_G, OPERAND)
        q += (x,)
        q_of_parts += (x * (_STEP_UNIT * 2.0 ** (-BITS - part * BITS)),)

    page_table_ptr += request.to(tl.int64) * page_table_stride
    summary_ptr += head.to(tl.int64) * summary_head_stride
    codes_ptr += head.to(tl.int64) * (PAGE_SIZE * NUM_BYTES)
    out_ptr += row.to(tl.int64) * out_row_stride
    group, token = tl.arange(0, BLOCK_G), tl.arange(0, PAGE_SIZE)
    for first in tl.range(split * BLOCK_P, end, num_splits * BLOCK_P, num_stages=_NUM_STAGES):
        column = first + tl.arange(0, BLOCK_P)
        page, is_page = load_pages(pages_ptr, page_table_ptr, column, end)
        code_ptrs = codes_ptr + page[:, None, None] * (NUM_KV_HEADS * PAGE_SIZE * NUM_BYTES)
        code_ptrs += token[None, :, None] * NUM_BYTES + byte[None, None, :]
        tile = tl.load(code_ptrs, mask=is_page[:, None, None] & is_byte[None, None, :], other=0)
        lo_ptrs = summary_ptr + page[:, None] * summary_page_stride + byte[None, :]
        is_bound = is_page[:, None] & is_byte[None, :]
        logits = tl.zeros((BLOCK_P, PAGE_SIZE, BLOCK_G), tl.float32)
        of_lo = tl.zeros((BLOCK_P, BLOCK_G), tl.float32)
        of_hi = tl.zeros((BLOCK_P, BLOCK_G), tl.float32)
        for part in tl.static_range(8 // BITS):
            part_ptrs = lo_ptrs + part * NUM_BYTES
            lo = tl.load(part_ptrs, mask=is_bound, other=0)
            hi = tl.load(part_ptrs + summary_bound_stride, mask=is_bound, other=0)
            logits, of_lo, of_hi = _add_part(tile, q[part], q_of_parts[part], lo, hi, logits, of_lo, of_hi, part, BITS)
        half_step: tl.constexpr = 2.0 ** (-BITS - 1)
        common = of_lo * (1 - half_step) + of_hi * half_step
        highest = tl.max(logits, 1)
        scores = highest * (1 / (_CODE_UNIT * _STEP_UNIT)) + common
        if scale is not None:
            unit = scale * (LOG2_E / (_CODE_UNIT * _STEP_UNIT))
            spread = tl.sum(tl.exp2(logits * unit - (highest * unit)[:, None, :]), 1)
            scores = scale * scores + tl.log2(spread) / LOG2_E
        out_ptrs = out_ptr + group[None, :] * out_group_stride + column[:, None]
        tl.store(out_ptrs, scores, mask=is_page[:, None] & (group < GROUP_SIZE)[None, :])
