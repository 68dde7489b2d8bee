"""Kernel of recall_blocks: a fixed number of programs walk the list and read the host store over the link."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.records_triton import load_elements, record_pointer
from freekv_kernels.tables import Count, MissList, PageStore

_RECALLS, _ABSENT_PAGES = tl.constexpr(int(Count.RECALLS)), tl.constexpr(int(Count.ABSENT_PAGES))
# PCIe 5 x16 moves some 55 GB/s with a latency of about 2 us: 110 KB on their way fill it. A program has one tile on its
# way for half of its time, so 64 programs are four times what it takes, and leave most of the GPU to other kernels.
_NUM_PROGRAMS = 64
_TILE_BYTES = 16384


@triton.jit
def recall_misses(
    program,
    num_programs,
    host_kv_ptr,
    pairs_ptr,
    entries_ptr,
    blocks_ptr,
    count_ptr,
    table_ptr,
    block_kv_ptr,
    kv_indices_ptr,
    counters_ptr,
    host_page_stride,
    host_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    RUN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CODEC: tl.constexpr,
):
    """Complete the window and copy what falls to one program of several, for `recall_blocks` and `fetch_blocks`."""
    count = tl.load(count_ptr)

    if kv_indices_ptr is not None:
        num_absent = 0
        for start in range(program * BLOCK, count, num_programs * BLOCK):
            miss = start + tl.arange(0, BLOCK)
            is_miss = miss < count
            pair = tl.load(pairs_ptr + miss, mask=is_miss, other=0)
            entry = tl.load(entries_ptr + miss, mask=is_miss, other=0)
            block = tl.load(table_ptr + pair, mask=is_miss, other=0)
            tl.store(kv_indices_ptr + entry, tl.maximum(block, 0), mask=is_miss)
            num_absent += tl.sum((block < 0).to(tl.int32))
        if num_absent > 0:
            tl.atomic_add(counters_ptr + _ABSENT_PAGES, num_absent, sem="relaxed")

    num_recalls = 0
    for miss in range(program, count, num_programs):
        block = tl.load(blocks_ptr + miss).to(tl.int64)
        pair = tl.load(pairs_ptr + miss)
        if block >= 0:
            page, head = pair // NUM_KV_HEADS, pair % NUM_KV_HEADS
            record_ptr = record_pointer(host_kv_ptr, page, head, host_page_stride, host_head_stride)
            for first in tl.static_range(0, RUN, TILE):
                element = first + tl.arange(0, TILE)
                in_run = element < RUN
                tile = load_elements(record_ptr, element, in_run, CODEC)
                tl.store(block_kv_ptr + block * RUN + element, tile, mask=in_run)
            num_recalls += 1
    if num_recalls > 0:
        tl.atomic_add(counters_ptr + _RECALLS, num_recalls, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["count_ptr", "table_ptr"])
def _recall_blocks_kernel(
    host_kv_ptr,
    pairs_ptr,
    entries_ptr,
    blocks_ptr,
    count_ptr,
    table_ptr,
    block_kv_ptr,
    kv_indices_ptr,
    counters_ptr,
    host_page_stride,
    host_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    RUN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CODEC: tl.constexpr,
):
    recall_misses(
        tl.program_id(0),
        tl.num_programs(0),
        host_kv_ptr,
        pairs_ptr,
        entries_ptr,
        blocks_ptr,
        count_ptr,
        table_ptr,
        block_kv_ptr,
        kv_indices_ptr,
        counters_ptr,
        host_page_stride,
        host_head_stride,
        NUM_KV_HEADS,
        RUN,
        TILE,
        BLOCK,
        CODEC,
    )


def num_recall_programs(num_entries: int) -> int:
    """Programs that recall a list of at most so many entries."""
    return min(_NUM_PROGRAMS, num_entries)


def copy_sizes(store: PageStore) -> dict[str, int | str]:
    """What a program of `recall_misses` has in hand at once, and the format of the records."""
    num_elements = store.block_kv[0].numel()
    tile = min(triton.next_power_of_2(num_elements), _TILE_BYTES // store.block_kv.element_size())
    return {"RUN": num_elements, "TILE": tile, "BLOCK": 128, "CODEC": store.codec.name}


def recall_blocks(
    store: PageStore,
    misses: MissList,
    counters: torch.Tensor,
    kv_indices: torch.Tensor | None = None,
) -> None:
    """See `freekv_kernels.recall_blocks`. The grid depends on shapes only: a CUDA graph can hold it.

    The GPU reads the pinned host store in place, 16 bytes per thread and load.
    """
    _recall_blocks_kernel[(num_recall_programs(len(misses.pairs)),)](
        store.host_kv,
        misses.pairs,
        misses.entries,
        misses.blocks,
        misses.count,
        store.table,
        store.block_kv,
        kv_indices,
        counters,
        *store.host_kv.stride()[:2],
        NUM_KV_HEADS=store.table.shape[1],
        **copy_sizes(store),
        num_warps=4,
    )
