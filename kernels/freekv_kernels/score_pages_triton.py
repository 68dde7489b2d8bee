"""Score pages: Triton kernel of `score_pages`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.fp8_triton import decode_fp8
from freekv_kernels.tables import Batch, FlagList, Half

NUM_PROGRAMS = 1024  # two waves of four per SM on a chip of 132 to 148, so that uneven requests even out


@triton.jit(
    do_not_specialize=[
        "page_table_stride",
        "pages_stride",
        "out_row_stride",
        "out_group_stride",
        "num_rows",
        "num_listed",
    ]
)
def _score_pages_kernel(
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
    num_listed,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_BYTES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A short list gets more programs per row.
    num_entries = num_rows if flag_count_ptr is None else tl.load(flag_count_ptr)
    if num_entries == 0:
        return
    num_splits = tl.num_programs(0) // num_entries
    split = tl.program_id(0) // num_entries
    if split >= num_splits:
        return
    row = tl.program_id(0) % num_entries
    if flag_rows_ptr is not None:
        row = tl.load(flag_rows_ptr + row)
    request, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    if tl.load(half_pages_ptr + request) <= tl.load(budget_pages_ptr + row):
        return
    num_pages = tl.load(num_pages_ptr + request).to(tl.int32)
    num_columns = num_pages
    if pages_ptr is not None:
        num_columns = tl.minimum(num_pages, num_listed)
        pages_ptr += row.to(tl.int64) * pages_stride

    group = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    is_dim = dim < HEAD_DIM
    query_ptr = queries_ptr + tl.load(rows_ptr + request) * query_row_stride + head * query_head_stride
    is_head = group < GROUP_SIZE
    q = tl.load(
        query_ptr + group[:, None] * query_group_stride + dim[None, :],
        mask=is_head[:, None] & is_dim[None, :],
        other=0.0,
    ).to(tl.float32)
    if codes_ptr is None:
        q_for_lo, q_for_hi = tl.minimum(q, 0.0), tl.maximum(q, 0.0)
    else:
        bits: tl.constexpr = NUM_BYTES * 8 // HEAD_DIM
        codes_ptr += head.to(tl.int64) * (PAGE_SIZE * NUM_BYTES)
        in_codes = tl.arange(0, PAGE_SIZE)[:, None] * NUM_BYTES + (dim % NUM_BYTES)[None, :]
        shift = dim // NUM_BYTES * bits

    page_table_ptr += request.to(tl.int64) * page_table_stride
    summary_ptr += head.to(tl.int64) * summary_head_stride
    out_ptr += row.to(tl.int64) * out_row_stride
    for first in range(split * BLOCK_P, num_columns, num_splits * BLOCK_P):
        column = first + tl.arange(0, BLOCK_P)
        logical, is_page = column, column < num_columns
        if pages_ptr is not None:
            logical = tl.load(pages_ptr + column, mask=is_page, other=-1)
            is_page = logical >= 0
        page = tl.load(page_table_ptr + logical, mask=is_page, other=0)
        bounds_ptr = summary_ptr + page[:, None] * summary_page_stride + dim[None, :]
        is_bound = is_page[:, None] & is_dim[None, :]
        lo = decode_fp8(tl.load(bounds_ptr, mask=is_bound, other=0))
        hi = decode_fp8(tl.load(bounds_ptr + summary_bound_stride, mask=is_bound, other=0))
        if codes_ptr is None:
            scores = tl.dot(q_for_lo, lo.T, input_precision=PRECISION)
            scores = tl.dot(q_for_hi, hi.T, scores, input_precision=PRECISION)
        else:
            # A byte is loaded once per channel in it, from one line of the cache: all channels are there for one dot.
            code_ptrs = codes_ptr + page[:, None, None] * (NUM_KV_HEADS * PAGE_SIZE * NUM_BYTES) + in_codes[None, :, :]
            code = tl.load(code_ptrs, mask=is_bound[:, None, :], other=0).to(tl.int32)
            code = (code >> shift[None, None, :]) & (2**bits - 1)
            step = (hi - lo) * 2.0**-bits
            k = (lo + step / 2)[:, None, :] + code.to(tl.float32) * step[:, None, :]
            k = k.reshape(BLOCK_P * PAGE_SIZE, BLOCK_D)
            logits = tl.dot(q, k.T, input_precision=PRECISION)
            logits = logits.reshape(BLOCK_G, BLOCK_P, PAGE_SIZE)
            scores = tl.max(logits, 2)
            if scale is not None:
                scores = scale * scores + tl.log(tl.sum(tl.exp(scale * (logits - scores[:, :, None])), 2))
        tl.store(
            out_ptr + group[:, None] * out_group_stride + column[None, :],
            scores,
            mask=is_head[:, None] & is_page[None, :],
        )


def score_pages(
    queries: torch.Tensor,
    summary: torch.Tensor,
    batch: Batch,
    half: Half,
    flags: FlagList | None = None,
    out: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    scale: float | None = None,
    pages: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `freekv_kernels.score_pages`.

    The grid depends on shapes only; its programs share the rows that there are. With `out` nothing is allocated.
    """
    num_kv_heads, head_dim = summary.shape[1], summary.shape[3]
    group_size = queries.shape[2]
    num_rows = len(batch.rows) * num_kv_heads
    num_columns = batch.page_table.shape[1] if pages is None else pages.shape[1]
    if out is None:
        out = queries.new_empty((num_rows, group_size, num_columns), dtype=torch.float32)
    block_d = triton.next_power_of_2(head_dim)
    page_size, num_bytes = (1, 0) if codes is None else codes.shape[2:]
    block_p = max(1, 8192 // (page_size * block_d))  # 8 KiB of minima, or 32 KiB of keys
    num_programs = min(num_rows * triton.cdiv(num_columns, block_p), max(num_rows, NUM_PROGRAMS))
    _score_pages_kernel[(num_programs,)](
        queries,
        summary,
        batch.rows,
        batch.page_table,
        batch.num_pages,
        batch.num_pages_at(half),
        batch.budget_pages,
        None if flags is None else flags.rows,
        None if flags is None else flags.count,
        out,
        codes,
        pages,
        scale,
        *queries.stride()[:3],
        *summary.stride()[:3],
        batch.page_table.stride(0),
        0 if pages is None else pages.stride(0),
        *out.stride()[:2],
        num_rows,
        num_columns,
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        BLOCK_G=16,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        PAGE_SIZE=page_size,
        NUM_BYTES=num_bytes,
        # The products of 16-bit numbers are exact in tf32, and summed in fp32; decoded keys are rounded to 11 bits.
        PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
        num_warps=max(4, page_size * block_d // 2048),  # 64 elements of decoded keys a thread
    )
    return out
