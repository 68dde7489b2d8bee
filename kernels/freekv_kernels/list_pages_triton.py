"""`list_pages` on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.tables import Batch

_BLOCK_PAGES = 1024  # 8 in each of 128 threads


def list_pages(batch: Batch, num_kv_heads: int, kv_indptr: torch.Tensor, kv_indices: torch.Tensor) -> None:
    """See `freekv_kernels.list_pages`. One launch; the grid is (row, run of pages)."""
    batch_size, max_pages = batch.page_table.shape
    _list_pages_kernel[(batch_size * num_kv_heads, (max_pages + _BLOCK_PAGES - 1) // _BLOCK_PAGES)](
        batch.page_table,
        batch.num_pages,
        kv_indptr,
        kv_indices,
        batch.page_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_PAGES=_BLOCK_PAGES,
        num_warps=4,
    )


@triton.jit
def _list_pages_kernel(
    page_table_ptr,
    num_pages_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    page_table_stride,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
):
    row = tl.program_id(0)
    request, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    start = tl.load(kv_indptr_ptr + row)
    num_entries = tl.load(kv_indptr_ptr + row + 1) - start
    is_padding = tl.load(num_pages_ptr + request) == 0

    entry = tl.program_id(1) * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    is_entry = entry < num_entries
    page = tl.load(page_table_ptr + request.to(tl.int64) * page_table_stride + entry, is_entry, other=0)
    pair = tl.where(is_padding, 0, page * NUM_KV_HEADS + head)
    tl.store(kv_indices_ptr + start + entry, pair.to(tl.int32), is_entry)
