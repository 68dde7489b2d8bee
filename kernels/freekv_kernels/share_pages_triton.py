"""Kernel of share_pages: one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.records_triton import load_nearest, record_pointer
from freekv_kernels.tables import Batch, FlagList, Half, PageStore


@triton.jit
def _load_masses(scores_ptr, group_stride, pages_ptr, column, end, last, of_last, GROUP_SIZE: tl.constexpr):
    """Logarithms of the masses of a block of columns, ``[BLOCK_G, BLOCK]``; -inf where there is no page."""
    page = column
    if pages_ptr is not None:
        page = tl.load(pages_ptr + column, mask=column < end, other=-1)
    group = tl.arange(0, of_last.shape[0])
    is_scored = (column < end) & (page >= 0) & (page < last)
    mask = (group < GROUP_SIZE)[:, None] & is_scored[None, :]
    masses = tl.load(scores_ptr + group[:, None] * group_stride + column[None, :], mask=mask, other=float("-inf"))
    is_last = (column < end) & (page == last)
    return tl.where(is_last[None, :], of_last[:, None], masses)


@triton.jit
def _mass_of_latest(
    query_ptr,
    query_group_stride,
    page_ptr,
    record_ptr,
    is_resident,
    num_tokens,
    scale,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CODEC: tl.constexpr,
):
    """Logarithm of the mass of the latest page, by its keys: ``[BLOCK_G]``, -inf past the group."""
    token, dim = tl.arange(0, PAGE_SIZE), tl.arange(0, BLOCK_D)
    is_key = (token < num_tokens)[:, None] & (dim < HEAD_DIM)[None, :]
    element = token[:, None] * HEAD_DIM + dim[None, :]
    keys = load_nearest(page_ptr, is_resident, record_ptr, element, is_key, CODEC).to(tl.float32)
    group = tl.arange(0, BLOCK_G)
    masses = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    for g in tl.static_range(GROUP_SIZE):
        q = tl.load(query_ptr + g * query_group_stride + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        logits = tl.where(token < num_tokens, scale * tl.sum(keys * q[None, :], 1), float("-inf"))
        peak = tl.max(logits, 0)
        masses = tl.where(group == g, peak + tl.log(tl.sum(tl.exp(logits - peak), 0)), masses)
    return masses


@triton.jit
def share_row(
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
    last,
    scale,
    num_columns,
    scores_group_stride,
    query_row_stride,
    query_head_stride,
    query_group_stride,
    page_table_stride,
    host_page_stride,
    host_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CODEC: tl.constexpr,
):
    """Write a row's shares in place of its first head's masses. `scores_ptr` and `pages_ptr` are the row's own."""
    request, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    page = tl.load(page_table_ptr + request.to(tl.int64) * page_table_stride + last)
    block = tl.load(table_ptr + page * NUM_KV_HEADS + head).to(tl.int64)
    num_tokens = (tl.load(slots_ptr + request) % PAGE_SIZE).to(tl.int32) + 1
    of_last = _mass_of_latest(
        queries_ptr + tl.load(rows_ptr + request) * query_row_stride + head * query_head_stride,
        query_group_stride,
        block_kv_ptr + block * (2 * PAGE_SIZE * HEAD_DIM),
        record_pointer(host_kv_ptr, page, head, host_page_stride, host_head_stride),
        block >= 0,
        num_tokens,
        scale,
        GROUP_SIZE,
        HEAD_DIM,
        PAGE_SIZE,
        BLOCK_G,
        BLOCK_D,
        CODEC,
    )

    end = last + 1 if pages_ptr is None else num_columns
    peak = of_last  # a number, also where the first block has no page
    total = tl.zeros((BLOCK_G,), tl.float32)
    for first in range(0, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = _load_masses(scores_ptr, scores_group_stride, pages_ptr, column, end, last, of_last, GROUP_SIZE)
        x = tl.where((tl.arange(0, BLOCK_G) < GROUP_SIZE)[:, None], x, float("-inf"))
        peak_before, peak = peak, tl.maximum(peak, tl.max(x, 1))
        is_finite = peak > float("-inf")  # past the group there is nothing
        total = total * tl.where(is_finite, tl.exp(peak_before - peak), 0.0)
        total += tl.sum(tl.where(is_finite[:, None], tl.exp(x - peak[:, None]), 0.0), 1)
    log_total = tl.where(tl.arange(0, BLOCK_G) < GROUP_SIZE, peak + tl.log(tl.maximum(total, 1.0)), float("inf"))

    for first in range(0, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = _load_masses(scores_ptr, scores_group_stride, pages_ptr, column, end, last, of_last, GROUP_SIZE)
        x -= log_total[:, None]
        highest = tl.max(x, 0)
        spread = tl.sum(tl.exp(x - tl.where(highest > float("-inf"), highest, 0.0)[None, :]), 0)
        shares = highest + tl.log(tl.maximum(spread, 1.0) / GROUP_SIZE)  # where there is a page it is 1 or more
        tl.debug_barrier()  # other threads may still read what is overwritten
        tl.store(scores_ptr + column, shares, mask=column < end)


@triton.jit(do_not_specialize=["scores_row_stride", "scores_group_stride", "page_table_stride", "num_columns"])
def _share_pages_kernel(
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
    half_pages_ptr,
    budget_pages_ptr,
    flag_rows_ptr,
    flag_count_ptr,
    scale,
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
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CODEC: tl.constexpr,
):
    row = tl.program_id(0)
    if flag_rows_ptr is not None:
        if row >= tl.load(flag_count_ptr):
            return
        row = tl.load(flag_rows_ptr + row)
    request = row // NUM_KV_HEADS
    if tl.load(half_pages_ptr + request) <= tl.load(budget_pages_ptr + row):
        return
    if pages_ptr is not None:
        pages_ptr += row.to(tl.int64) * pages_stride
    share_row(
        scores_ptr + row.to(tl.int64) * scores_row_stride,
        queries_ptr,
        rows_ptr,
        slots_ptr,
        page_table_ptr,
        table_ptr,
        host_kv_ptr,
        block_kv_ptr,
        pages_ptr,
        row,
        tl.load(num_pages_ptr + request).to(tl.int32) - 1,
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


def tensors_and_sizes(
    scores: torch.Tensor,
    queries: torch.Tensor,
    store: PageStore,
    batch: Batch,
    pages: torch.Tensor | None,
    block: int,
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...], dict[str, object]]:
    """What `share_row` is given: tensors, then `num_columns` and strides, then constants."""
    _, group_size, num_columns = scores.shape
    num_kv_heads, head_dim = queries.shape[1], queries.shape[3]
    tensors = (scores, queries, batch.rows, batch.slots, batch.page_table, store.table, store.host_kv, store.block_kv)
    strides = (
        *scores.stride()[:2],
        *queries.stride()[:3],
        batch.page_table.stride(0),
        0 if pages is None else pages.stride(0),
        *store.host_kv.stride()[:2],
    )
    block_g = triton.next_power_of_2(group_size)
    constants = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": store.block_kv.shape[2],
        "BLOCK": min(block, 8192 // block_g),
        "BLOCK_G": block_g,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "CODEC": store.codec.name,
    }
    return (*tensors, pages), (num_columns, *strides), constants


def share_pages(
    scores: torch.Tensor,
    queries: torch.Tensor,
    store: PageStore,
    batch: Batch,
    half: Half,
    scale: float,
    flags: FlagList | None = None,
    pages: torch.Tensor | None = None,
) -> None:
    """See `freekv_kernels.share_pages`. The grid depends on shapes only, and nothing is allocated."""
    tensors, sizes, constants = tensors_and_sizes(scores, queries, store, batch, pages, block=1024)
    _share_pages_kernel[(len(scores),)](
        *tensors,
        batch.num_pages,
        batch.num_pages_at(half),
        batch.budget_pages,
        None if flags is None else flags.rows,
        None if flags is None else flags.count,
        scale,
        *sizes,
        **constants,
        num_warps=8,
    )
