"""Kernel of fill_arena: a fixed number of programs walk the (page, KV head) records."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.records_triton import load_nearest, record_pointer
from freekv_kernels.tables import PageStore

# About one per SM: enough loads on their way to fill the link, and room for the attention that runs beside them.
_MAX_PROGRAMS = 128


@triton.jit(do_not_specialize=["num_pages"], do_not_specialize_on_alignment=["pages_ptr", "table_ptr"])
def _fill_arena_kernel(
    arena_ptr,
    host_kv_ptr,
    pages_ptr,
    block_kv_ptr,
    table_ptr,
    host_page_stride,
    host_head_stride,
    num_pages,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CODEC: tl.constexpr,
):
    i, d = tl.arange(0, 2 * PAGE_SIZE)[:, None], tl.arange(0, BLOCK_D)[None, :]  # i: the keys, then the values
    in_dim = d < HEAD_DIM
    in_record = i * HEAD_DIM + d
    in_tokens = ((i % PAGE_SIZE) * 2 + i // PAGE_SIZE) * (NUM_KV_HEADS * HEAD_DIM) + d
    for record in range(tl.program_id(0), num_pages * NUM_KV_HEADS, tl.num_programs(0)):
        index, head = record // NUM_KV_HEADS, record % NUM_KV_HEADS
        page = tl.load(pages_ptr + index)  # int64
        block = tl.load(table_ptr + page * NUM_KV_HEADS + head).to(tl.int64)
        record_ptr = record_pointer(host_kv_ptr, page, head, host_page_stride, host_head_stride)
        block_ptr = block_kv_ptr + block * (2 * PAGE_SIZE * HEAD_DIM)
        token_ptr = arena_ptr + tl.cast(index, tl.int64) * (PAGE_SIZE * 2 * NUM_KV_HEADS * HEAD_DIM) + head * HEAD_DIM
        value = load_nearest(block_ptr, block >= 0, record_ptr, in_record, in_dim, CODEC)
        tl.store(token_ptr + in_tokens, value, in_dim)


def fill_arena(arena: torch.Tensor, store: PageStore, pages: torch.Tensor) -> None:
    """See `freekv_kernels.fill_arena`. Resident records are read from their blocks, the others over the link."""
    num_kv_heads, head_dim = arena.shape[2:]
    page_size, block_d = store.block_kv.shape[2], triton.next_power_of_2(head_dim)
    _fill_arena_kernel[(min(len(pages) * num_kv_heads, _MAX_PROGRAMS),)](
        arena,
        store.host_kv,
        pages,
        store.block_kv,
        store.table,
        *store.host_kv.stride()[:2],
        len(pages),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_D=block_d,
        CODEC=store.codec.name,
        num_warps=min(8, max(1, page_size * block_d // 1024)),  # 64 elements a thread: eight loads of 16 bytes
    )
