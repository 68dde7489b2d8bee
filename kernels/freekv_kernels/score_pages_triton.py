"""Score pages: Triton kernel of `score_pages`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.fp8_triton import decode_fp8
from freekv_kernels.score_codes_triton import _score_codes_kernel
from freekv_kernels.score_grid_triton import NUM_PROGRAMS, load_pages, share_of_rows
from freekv_kernels.tables import Batch, FlagList, Half


@triton.jit(
    do_not_specialize=["page_table_stride", "pages_stride", "out_row_stride", "out_group_stride", "num_rows", "width"]
)
def _score_bounds_kernel(
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
    pages_ptr,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
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

    group, dim = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    is_head, is_dim = group < GROUP_SIZE, dim < HEAD_DIM
    query_ptr = queries_ptr + tl.load(rows_ptr + request) * query_row_stride + head * query_head_stride
    query_ptrs = query_ptr + group[:, None] * query_group_stride + dim[None, :]
    q = tl.load(query_ptrs, mask=is_head[:, None] & is_dim[None, :], other=0.0).to(tl.float32)
    q_for_lo, q_for_hi = tl.minimum(q, 0.0), tl.maximum(q, 0.0)

    page_table_ptr += request.to(tl.int64) * page_table_stride
    summary_ptr += head.to(tl.int64) * summary_head_stride
    out_ptr += row.to(tl.int64) * out_row_stride
    for first in range(split * BLOCK_P, end, num_splits * BLOCK_P):
        column = first + tl.arange(0, BLOCK_P)
        page, is_page = load_pages(pages_ptr, page_table_ptr, column, end)
        bounds_ptr = summary_ptr + page[:, None] * summary_page_stride + dim[None, :]
        is_bound = is_page[:, None] & is_dim[None, :]
        lo = decode_fp8(tl.load(bounds_ptr, mask=is_bound, other=0)).to(tl.float32)
        hi = decode_fp8(tl.load(bounds_ptr + summary_bound_stride, mask=is_bound, other=0)).to(tl.float32)
        scores = tl.dot(q_for_lo, lo.T, input_precision=PRECISION)
        scores = tl.dot(q_for_hi, hi.T, scores, input_precision=PRECISION)
        out_ptrs = out_ptr + group[:, None] * out_group_stride + column[None, :]
        tl.store(out_ptrs, scores, mask=is_head[:, None] & is_page[None, :])


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
    tensors = (
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
    )
    sizes = (
        *queries.stride()[:3],
        *summary.stride()[:3],
        batch.page_table.stride(0),
        0 if pages is None else pages.stride(0),
        *out.stride()[:2],
        num_rows,
        num_columns,
    )
    shape = {"NUM_KV_HEADS": num_kv_heads, "GROUP_SIZE": group_size}
    is_exact = queries.dtype == torch.float32
    if codes is None:
        block_d = triton.next_power_of_2(head_dim)
        shape |= {"HEAD_DIM": head_dim, "BLOCK_G": 16, "BLOCK_D": block_d, "BLOCK_P": 8192 // block_d}
        # The products of 16-bit numbers are exact in tf32, and summed in fp32.
        kernel, more, shape["PRECISION"] = _score_bounds_kernel, (pages,), "ieee" if is_exact else "tf32"
    else:
        shape |= _shape_of_codes(codes, head_dim, group_size, is_exact)
        kernel, more = _score_codes_kernel, (codes, pages, scale)
    blocks = triton.cdiv(num_columns, shape["BLOCK_P"])
    kernel[(min(num_rows * blocks, max(num_rows, NUM_PROGRAMS)),)](*tensors, *more, *sizes, **shape)
    return out


def _shape_of_codes(codes: torch.Tensor, head_dim: int, group_size: int, is_exact: bool) -> dict[str, object]:
    """How a program goes through the pages: as many at a time as its registers hold, by what was compiled."""
    page_size, num_bytes = codes.shape[2:]
    bits, block_g = num_bytes * 8 // head_dim, max(8, triton.next_power_of_2(group_size))
    is_common = head_dim == 128 and bits > 1 and block_g == 8
    return {
        "BLOCK_G": block_g,
        "BLOCK_P": (16 if is_common else 8) * 32 // max(32, page_size),
        "BLOCK_B": max(16, triton.next_power_of_2(num_bytes)),
        "PAGE_SIZE": page_size,
        "NUM_BYTES": num_bytes,
        "BITS": bits,
        "OPERAND": tl.float32 if is_exact else tl.float16,
        "num_warps": 4,
    }
