"""Kernel of store_pages: a fixed number of programs walk the (page, KV head) records of the chunk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.fp8_triton import decode_fp8, encode_fp8
from freekv_kernels.records_triton import record_pointer, store_elements
from freekv_kernels.tables import PageStore

# About one per SM: enough stores on their way to fill the link, and room for the attention that runs beside them.
_MAX_PROGRAMS = 128


@triton.jit(
    do_not_specialize=["num_runs"], do_not_specialize_on_alignment=["slots_ptr", "page_starts_ptr", "table_ptr"]
)
def _store_pages_kernel(
    k_ptr,
    v_ptr,
    slots_ptr,
    page_starts_ptr,
    table_ptr,
    host_kv_ptr,
    summary_ptr,
    block_kv_ptr,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    host_page_stride,
    host_head_stride,
    num_runs,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CODEC: tl.constexpr,
):
    i, d = tl.arange(0, PAGE_SIZE)[:, None], tl.arange(0, BLOCK_D)
    in_dim = d < HEAD_DIM
    for record in range(tl.program_id(0), num_runs * NUM_KV_HEADS, tl.num_programs(0)):
        run, head = record // NUM_KV_HEADS, record % NUM_KV_HEADS
        start = tl.load(page_starts_ptr + run)
        num_tokens = tl.load(page_starts_ptr + run + 1) - start
        slot = tl.load(slots_ptr + start)
        page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE  # int64, as are all offsets below that start from them
        page_head = page * NUM_KV_HEADS + head
        block = tl.load(table_ptr + page_head).to(tl.int64)

        mask = (i < num_tokens) & in_dim[None, :]
        k = tl.load(k_ptr + (start + i) * k_stride + head * k_head_stride + d[None, :], mask, other=0.0)
        v = tl.load(v_ptr + (start + i) * v_stride + head * v_head_stride + d[None, :], mask, other=0.0)
        if summary_ptr is not None:
            low_ptrs = summary_ptr + page_head * (2 * HEAD_DIM) + d
            is_known = in_dim & (offset > 0)  # a token at offset 0 opens the page
            known_low = tl.load(low_ptrs, is_known, other=0)
            known_high = tl.load(low_ptrs + HEAD_DIM, is_known, other=0)

        in_record = (offset + i) * HEAD_DIM + d[None, :]
        record_ptr = record_pointer(host_kv_ptr, page, head, host_page_stride, host_head_stride)
        k_read = store_elements(record_ptr, in_record, k, mask, CODEC)
        v_read = store_elements(record_ptr, PAGE_SIZE * HEAD_DIM + in_record, v, mask, CODEC)
        block_ptrs = block_kv_ptr + block * (2 * PAGE_SIZE * HEAD_DIM) + in_record
        is_resident = mask & (block >= 0)
        tl.store(block_ptrs, k_read, is_resident)
        tl.store(block_ptrs + PAGE_SIZE * HEAD_DIM, v_read, is_resident)

        if summary_ptr is not None:
            # A page has one run, so no other program is here; a thread that reads what another wrote folds to the same.
            k = k.to(tl.float32)
            low = tl.min(tl.where(mask, k, float("inf")), 0)
            high = tl.max(tl.where(mask, k, float("-inf")), 0)
            low = tl.where(is_known, tl.minimum(decode_fp8(known_low).to(tl.float32), low), low)
            high = tl.where(is_known, tl.maximum(decode_fp8(known_high).to(tl.float32), high), high)
            tl.store(low_ptrs, encode_fp8(low, False), in_dim)
            tl.store(low_ptrs + HEAD_DIM, encode_fp8(high, True), in_dim)


def store_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    page_starts: torch.Tensor,
    store: PageStore,
) -> None:
    """See `freekv_kernels.store_pages`. Every token is read once and written by 16-byte stores.

    k and v may be slices of a fused projection; their head_dim is contiguous. Of a block, only the chunk's tokens are
    written.
    """
    num_kv_heads, head_dim = k.shape[1:]
    num_runs, page_size = len(page_starts) - 1, store.block_kv.shape[2]
    block_d = triton.next_power_of_2(head_dim)
    _store_pages_kernel[(min(num_runs * num_kv_heads, _MAX_PROGRAMS),)](
        k,
        v,
        slots,
        page_starts,
        store.table,
        store.host_kv,
        store.summary,
        store.block_kv,
        *k.stride()[:2],
        *v.stride()[:2],
        *store.host_kv.stride()[:2],
        num_runs,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_D=block_d,
        CODEC=store.codec.name,
        num_warps=min(8, max(1, page_size * block_d // 1024)),  # 32 keys and 32 values a thread
    )
