"""Kernel of encode_pages: a fixed number of programs walk the (slot, KV head) records; some complete a page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.encode_pages import LEAST_STEP
from freekv_kernels.fp8_triton import decode_fp8, encode_fp8
from freekv_kernels.records_triton import load_nearest, record_pointer
from freekv_kernels.tables import GROUP_PAGES, PageStore

_MAX_PROGRAMS = 128  # as many as of store_pages, which is as far from filling the link with one per SM
_LEAST_STEP = tl.constexpr(LEAST_STEP)
_GROUP_PAGES = tl.constexpr(GROUP_PAGES)


@triton.jit
def encode_page(
    page_head,
    head,
    block_ptr,
    is_resident,
    record_ptr,
    summary_ptr,
    codes_ptr,
    group_ptr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    NUM_BYTES: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    CODEC: tl.constexpr,
):
    """Encode a full (page, KV head), int64, by the keys in its block, where it has one, or in its record."""
    i, byte = tl.arange(0, PAGE_SIZE)[:, None], tl.arange(0, BLOCK_BYTES)
    is_byte = byte < NUM_BYTES
    low_ptrs = summary_ptr + page_head * (2 * HEAD_DIM)
    packed = tl.zeros((PAGE_SIZE, BLOCK_BYTES), tl.int32)
    for part in tl.static_range(8 // BITS):
        d = part * NUM_BYTES + byte
        element = i * HEAD_DIM + d[None, :]
        k = load_nearest(block_ptr, is_resident, record_ptr, element, is_byte[None, :], CODEC).to(tl.float32)
        low = decode_fp8(tl.load(low_ptrs + d, is_byte, other=0)).to(tl.float32)
        high = decode_fp8(tl.load(low_ptrs + HEAD_DIM + d, is_byte, other=0)).to(tl.float32)
        if group_ptr is not None:
            ends_group = tl.load(group_ptr + _GROUP_PAGES - 1) >= 0
            if ends_group:
                # Full pages, whose summaries no other program writes; the page's own is above.
                for member in tl.static_range(_GROUP_PAGES - 1):
                    member_head = tl.load(group_ptr + member) * NUM_KV_HEADS + head
                    member_ptrs = summary_ptr + member_head * (2 * HEAD_DIM) + d
                    member_low = tl.load(member_ptrs, is_byte, other=0)
                    member_high = tl.load(member_ptrs + HEAD_DIM, is_byte, other=0)
                    low = tl.minimum(low, decode_fp8(member_low).to(tl.float32))
                    high = tl.maximum(high, decode_fp8(member_high).to(tl.float32))
                tl.store(low_ptrs + d, encode_fp8(low, False), is_byte)
                tl.store(low_ptrs + HEAD_DIM + d, encode_fp8(high, True), is_byte)
        step = tl.maximum((high - low) * 2.0**-BITS, _LEAST_STEP)
        value = tl.div_rn(k - low[None, :], tl.broadcast_to(step[None, :], k.shape))  # rounded as in torch
        value = tl.minimum(tl.maximum(value, 0.0), 2**BITS - 1).to(tl.int32)  # so that truncation is floor
        packed |= value << (part * BITS)
    code_ptrs = codes_ptr + page_head * (PAGE_SIZE * NUM_BYTES) + i * NUM_BYTES + byte[None, :]
    tl.store(code_ptrs, packed.to(tl.uint8), is_byte[None, :])


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["slots_ptr", "groups_ptr"])
def _encode_pages_kernel(
    slots_ptr,
    host_kv_ptr,
    summary_ptr,
    codes_ptr,
    groups_ptr,
    host_page_stride,
    host_head_stride,
    num_slots,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    NUM_BYTES: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    CODEC: tl.constexpr,
):
    for record in range(tl.program_id(0), num_slots * NUM_KV_HEADS, tl.num_programs(0)):
        slot, head = tl.load(slots_ptr + record // NUM_KV_HEADS), record % NUM_KV_HEADS
        if slot % PAGE_SIZE == PAGE_SIZE - 1:
            page = slot // PAGE_SIZE  # int64, as are all offsets that start from it
            record_ptr = record_pointer(host_kv_ptr, page, head, host_page_stride, host_head_stride)
            encode_page(
                page * NUM_KV_HEADS + head,
                head,
                record_ptr,
                False,
                record_ptr,
                summary_ptr,
                codes_ptr,
                None if groups_ptr is None else groups_ptr + record // NUM_KV_HEADS * _GROUP_PAGES,
                NUM_KV_HEADS,
                HEAD_DIM,
                PAGE_SIZE,
                BITS,
                NUM_BYTES,
                BLOCK_BYTES,
                CODEC,
            )


def encode_pages(
    slots: torch.Tensor, store: PageStore, codes: torch.Tensor, groups: torch.Tensor | None = None
) -> None:
    """See `freekv_kernels.encode_pages`. The grid depends on shapes only: a CUDA graph can hold it.

    Which pages are full is read on the device, and their keys over the link, in place, once.
    """
    num_kv_heads, (page_size, head_dim) = store.table.shape[1], store.block_kv.shape[2:]
    _encode_pages_kernel[(min(len(slots) * num_kv_heads, _MAX_PROGRAMS),)](
        slots,
        store.host_kv,
        store.summary,
        codes,
        groups,
        *store.host_kv.stride()[:2],
        len(slots),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        CODEC=store.codec.name,
        **shape_of_codes(codes, head_dim),
        num_warps=num_encode_warps(codes),
    )


def shape_of_codes(codes: torch.Tensor, head_dim: int) -> dict[str, int]:
    """How the codes of a token lie in bytes."""
    num_bytes = codes.shape[-1]
    return {
        "BITS": num_bytes * 8 // head_dim,
        "NUM_BYTES": num_bytes,
        "BLOCK_BYTES": triton.next_power_of_2(num_bytes),
    }


def num_encode_warps(codes: torch.Tensor) -> int:
    """Of a program: so many that a thread has 8 keys of each part, in loads of 16 bytes."""
    page_size, num_bytes = codes.shape[-2:]
    return min(8, max(1, page_size * triton.next_power_of_2(num_bytes) // 256))
