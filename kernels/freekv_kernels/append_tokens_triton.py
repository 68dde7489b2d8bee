"""Kernel of append_tokens: one program per (request, KV head), which encodes the page that its token fills."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.encode_pages_triton import encode_page, num_encode_warps, shape_of_codes
from freekv_kernels.fp8_triton import decode_fp8, encode_fp8
from freekv_kernels.records_triton import record_pointer, store_elements
from freekv_kernels.tables import GROUP_PAGES, Batch, Count, FlagList, PageStore

_ROWS, _PAGES_READ = tl.constexpr(int(Count.ROWS)), tl.constexpr(int(Count.PAGES_READ))
_FLAGGED_ROWS = tl.constexpr(int(Count.FLAGGED_ROWS))
_SCORED_ROWS, _SCORED_PAGES = tl.constexpr(int(Count.SCORED_ROWS)), tl.constexpr(int(Count.SCORED_PAGES))
_GROUP_PAGES = tl.constexpr(GROUP_PAGES)
_EPS = tl.constexpr(1e-8)  # torch.cosine_similarity's least norm


@triton.jit
def _find_due(row, left, num_pages, budget, next_pages, counters_ptr, left_ptr, rows_ptr, count_ptr, is_due_ptr):
    """See `freekv_kernels.append_tokens`: count a row that is due, and list it where there is a list."""
    is_due = next_pages > budget
    if left_ptr is not None:
        is_waiting = is_due & (left > 0) & (next_pages == num_pages)
        tl.store(left_ptr, left - 1, is_waiting)
        is_due = is_due & ~is_waiting
        tl.store(is_due_ptr + row, is_due)
    if is_due:
        if left_ptr is not None:
            tl.store(rows_ptr + tl.atomic_add(count_ptr, 1, sem="relaxed"), row)
        tl.atomic_add(counters_ptr + _SCORED_ROWS, 1, sem="relaxed")
        tl.atomic_add(counters_ptr + _SCORED_PAGES, num_pages, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["table_ptr", "flag_count_ptr", "due_count_ptr", "is_due_ptr", "pace_ptr"])
def _append_tokens_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    slots_ptr,
    num_pages_ptr,
    num_pages_next_ptr,
    budget_pages_ptr,
    tau,
    table_ptr,
    host_kv_ptr,
    summary_ptr,
    block_kv_ptr,
    last_q_ptr,
    flag_rows_ptr,
    flag_count_ptr,
    is_flagged_ptr,
    counters_ptr,
    queries_ptr,
    codes_ptr,
    groups_ptr,
    pace_ptr,
    due_rows_ptr,
    due_count_ptr,
    is_due_ptr,
    q_stride,
    q_head_stride,
    q_query_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    host_page_stride,
    host_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    NUM_BYTES: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    row = tl.program_id(0)
    request, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    slot = tl.load(slots_ptr + request)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE  # int64, as are all offsets below that start from them
    page_head = page * NUM_KV_HEADS + head
    d = tl.arange(0, BLOCK_D)
    in_dim = d < HEAD_DIM

    # All loads come before the first store, which would wait for its value: the latencies overlap.
    k = tl.load(k_ptr + request * k_stride + head * k_head_stride + d, in_dim, other=0.0)
    v = tl.load(v_ptr + request * v_stride + head * v_head_stride + d, in_dim, other=0.0)
    if summary_ptr is not None:
        low_ptrs = summary_ptr + page_head * (2 * HEAD_DIM) + d
        is_known = in_dim & (offset > 0)  # the token at offset 0 opens the page
        low = tl.load(low_ptrs, is_known, other=0)
        high = tl.load(low_ptrs + HEAD_DIM, is_known, other=0)
    block = tl.load(table_ptr + page_head).to(tl.int64)
    g = tl.arange(0, BLOCK_G)[:, None]
    in_group = (g < GROUP_SIZE) & in_dim[None, :]
    q_ptrs = q_ptr + request * q_stride + head * q_head_stride + g * q_query_stride + d[None, :]
    q = tl.load(q_ptrs, in_group, other=0.0)
    if flag_count_ptr is not None:
        request_head = tl.load(rows_ptr + request) * NUM_KV_HEADS + head
        last_q_ptrs = last_q_ptr + (request_head * GROUP_SIZE + g) * HEAD_DIM + d[None, :]
        if tau is not None:
            last_q = tl.load(last_q_ptrs, in_group, other=0.0)
        budget = tl.load(budget_pages_ptr + row)
        num_pages, next_pages = tl.load(num_pages_ptr + request), tl.load(num_pages_next_ptr + request)
        is_over = num_pages > budget
        left, left_ptr = 0, None
        if pace_ptr is not None:
            left_ptr = pace_ptr + request_head * 2 + 1
            left = tl.load(left_ptr)

    # No other program is at these cells; a thread that reads a bound after another wrote it folds to the same.
    record_ptr = record_pointer(host_kv_ptr, page, head, host_page_stride, host_head_stride)
    in_record = offset * HEAD_DIM + d
    k_read = store_elements(record_ptr, in_record, k, in_dim, CODEC)
    v_read = store_elements(record_ptr, PAGE_SIZE * HEAD_DIM + in_record, v, in_dim, CODEC)
    block_ptrs = block_kv_ptr + block * (2 * PAGE_SIZE * HEAD_DIM) + in_record
    is_resident = in_dim & (block >= 0)
    tl.store(block_ptrs, k_read, is_resident)
    tl.store(block_ptrs + PAGE_SIZE * HEAD_DIM, v_read, is_resident)
    if summary_ptr is not None:
        k = k.to(tl.float32)
        low = tl.where(is_known, tl.minimum(decode_fp8(low).to(tl.float32), k), k)
        high = tl.where(is_known, tl.maximum(decode_fp8(high).to(tl.float32), k), k)
        tl.store(low_ptrs, encode_fp8(low, False), in_dim)
        tl.store(low_ptrs + HEAD_DIM, encode_fp8(high, True), in_dim)

    if queries_ptr is not None:
        tl.store(queries_ptr + (row * GROUP_SIZE + g) * HEAD_DIM + d[None, :], q, in_group)
    if flag_count_ptr is not None:
        tl.debug_barrier()  # a thread may overwrite a query that another one reads
        tl.store(last_q_ptrs, q, in_group)
        is_flagged = False
        if tau is not None:
            q, last_q = q.to(tl.float32), last_q.to(tl.float32)
            norm = tl.maximum(tl.sqrt(tl.sum(q * q, 1)), _EPS)
            last_norm = tl.maximum(tl.sqrt(tl.sum(last_q * last_q, 1)), _EPS)
            cosine = tl.sum(q * last_q, 1) / (norm * last_norm)  # 0 past the group
            is_flagged = is_over & (tl.sum(cosine, 0) / GROUP_SIZE < tau)
        tl.store(is_flagged_ptr + row, is_flagged)
        # Relaxed: the next kernel reads them, and to order them after the stores is to wait for the host's memory.
        if is_flagged:
            tl.store(flag_rows_ptr + tl.atomic_add(flag_count_ptr, 1, sem="relaxed"), row)
            tl.atomic_add(counters_ptr + _FLAGGED_ROWS, 1, sem="relaxed")
        if is_over:
            tl.atomic_add(counters_ptr + _ROWS, 1, sem="relaxed")
            tl.atomic_add(counters_ptr + _PAGES_READ, budget, sem="relaxed")
        due_ptrs = (left_ptr, due_rows_ptr, due_count_ptr, is_due_ptr)
        _find_due(row, left, num_pages, budget, next_pages, counters_ptr, *due_ptrs)

    if codes_ptr is not None:
        is_full = offset == PAGE_SIZE - 1
        if is_full:
            tl.debug_barrier()  # threads read the key and the bounds that others have written
            encode_page(
                page_head,
                head,
                block_kv_ptr + block * (2 * PAGE_SIZE * HEAD_DIM),
                block >= 0,
                record_ptr,
                summary_ptr,
                codes_ptr,
                None if groups_ptr is None else groups_ptr + request * _GROUP_PAGES,
                NUM_KV_HEADS,
                HEAD_DIM,
                PAGE_SIZE,
                BITS,
                NUM_BYTES,
                BLOCK_BYTES,
                CODEC,
            )


def append_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Batch,
    tau: float | None,
    store: PageStore,
    last_q: torch.Tensor,
    flags: FlagList | None,
    counters: torch.Tensor,
    queries: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    pace: torch.Tensor | None = None,
    due: FlagList | None = None,
) -> None:
    """See `freekv_kernels.append_tokens`. The grid depends on the batch size only: a CUDA graph can hold it.

    q, k and v may be slices of a fused projection; their head_dim is contiguous. The host store is written over the
    link, in place; the keys of a page that is full are read from there where it has no block.
    """
    batch_size, num_kv_heads, group_size, head_dim = q.shape
    block_g, block_d = triton.next_power_of_2(group_size), triton.next_power_of_2(head_dim)
    num_warps = max(1, block_g * block_d // 512)  # 16 queries' elements a thread; mostly one warp
    of_codes = {"BITS": None, "NUM_BYTES": None, "BLOCK_BYTES": None}
    if codes is not None:
        of_codes, num_warps = shape_of_codes(codes, head_dim), max(num_warps, num_encode_warps(codes))
    _append_tokens_kernel[(batch_size * num_kv_heads,)](
        q,
        k,
        v,
        batch.rows,
        batch.slots,
        batch.num_pages,
        batch.num_pages_next,
        batch.budget_pages,
        tau,
        store.table,
        store.host_kv,
        store.summary,
        store.block_kv,
        last_q,
        *(flags or (None, None, None)),
        counters,
        queries,
        codes,
        groups,
        pace,
        *(due or (None, None, None)),
        *q.stride()[:3],
        *k.stride()[:2],
        *v.stride()[:2],
        *store.host_kv.stride()[:2],
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        PAGE_SIZE=store.block_kv.shape[2],
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        CODEC=store.codec.name,
        **of_codes,
        num_warps=num_warps,
    )
