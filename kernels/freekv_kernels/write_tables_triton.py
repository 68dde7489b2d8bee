"""`write_tables` on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.tables import GROUP_PAGES, Batch, PairList

_BLOCK_PAGES = 1024  # 8 independent gathers in each of 128 threads
_BLOCK_REQUESTS = 128
_GROUP_PAGES = tl.constexpr(GROUP_PAGES)


def write_tables(
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    slots: torch.Tensor,
    req_to_token: torch.Tensor,
    budget_pages: torch.Tensor,
    page_size: int,
    batch: Batch,
    last_page_len: torch.Tensor,
    windows: torch.Tensor,
    filled: torch.Tensor,
    opened: PairList,
) -> None:
    """See `freekv_kernels.write_tables`. One launch; the grid is (request, run of pages)."""
    batch_size, max_pages = batch.page_table.shape
    num_layers, _, num_kv_heads, width = windows.shape[1:]
    _write_tables_kernel[(batch_size, (max_pages + _BLOCK_PAGES - 1) // _BLOCK_PAGES)](
        rows,
        seq_lens,
        slots,
        req_to_token,
        budget_pages,
        *batch[:6],
        batch.groups,
        last_page_len,
        windows,
        filled,
        *opened,
        req_to_token.stride(0),
        batch.page_table.stride(0),
        windows.stride(1),
        batch_size,
        len(slots),
        PAGE_SIZE=page_size,
        NUM_LAYERS=num_layers,
        NUM_KV_HEADS=num_kv_heads,
        WIDTH=width,
        BLOCK_PAGES=_BLOCK_PAGES,
        BLOCK_REQUESTS=_BLOCK_REQUESTS,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["batch_size", "num_slots"])
def _write_tables_kernel(
    rows_ptr,
    seq_lens_ptr,
    slots_ptr,
    req_to_token_ptr,
    budgets_ptr,
    batch_rows_ptr,
    batch_slots_ptr,
    page_table_ptr,
    num_pages_ptr,
    num_pages_next_ptr,
    batch_budgets_ptr,
    groups_ptr,
    last_page_len_ptr,
    windows_ptr,
    filled_ptr,
    opened_pairs_ptr,
    opened_count_ptr,
    req_to_token_stride,
    page_table_stride,
    windows_layer_stride,
    batch_size,
    num_slots,
    PAGE_SIZE: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    BLOCK_REQUESTS: tl.constexpr,
):
    BLOCK_HEADS: tl.constexpr = triton.next_power_of_2(NUM_KV_HEADS)  # here, as it costs microseconds on the host
    BLOCK_WINDOWS: tl.constexpr = triton.next_power_of_2(2 * NUM_LAYERS * NUM_KV_HEADS)
    request, run = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + request).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + request).to(tl.int64)
    num_pages = tl.where(row > 0, (seq_len - 1) // PAGE_SIZE + 1, 0)

    page = run * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    is_page = page < num_pages
    slot = tl.load(req_to_token_ptr + row * req_to_token_stride + page * PAGE_SIZE, is_page, other=0)
    tl.store(page_table_ptr + request.to(tl.int64) * page_table_stride + page, slot.to(tl.int64) // PAGE_SIZE, is_page)

    if run == 0:
        new_slot = tl.load(slots_ptr + request, request < num_slots, other=0).to(tl.int64)
        tl.store(batch_rows_ptr + request, row)
        tl.store(batch_slots_ptr + request, new_slot)
        tl.store(num_pages_ptr + request, num_pages)
        tl.store(num_pages_next_ptr + request, tl.where(row > 0, seq_len // PAGE_SIZE + 1, 0))
        member = tl.arange(0, _GROUP_PAGES)
        is_group = (num_pages > 0) & (num_pages % _GROUP_PAGES == 0)
        member_page = num_pages - _GROUP_PAGES + member
        member_ptrs = req_to_token_ptr + row * req_to_token_stride + member_page * PAGE_SIZE
        group = tl.where(is_group, tl.load(member_ptrs, is_group, other=0).to(tl.int64) // PAGE_SIZE, -1)
        tl.store(groups_ptr + request * _GROUP_PAGES + member, group)
        # Padding writes to page 0, all of it the same value.
        tl.store(filled_ptr + new_slot // PAGE_SIZE, (new_slot % PAGE_SIZE + 1).to(tl.int32))
        head = tl.arange(0, BLOCK_HEADS)
        last_len = ((seq_len - 1) % PAGE_SIZE + 1).to(tl.int32)
        tl.store(last_page_len_ptr + request * NUM_KV_HEADS + head, last_len, head < NUM_KV_HEADS)
        budget = tl.load(budgets_ptr + row * NUM_KV_HEADS + head, head < NUM_KV_HEADS, other=0)
        tl.store(batch_budgets_ptr + request * NUM_KV_HEADS + head, budget, head < NUM_KV_HEADS)

        if (row > 0) & (new_slot % PAGE_SIZE == 0):
            entry = tl.arange(0, BLOCK_WINDOWS)  # of [2, num_layers, num_kv_heads]
            is_entry = entry < 2 * NUM_LAYERS * NUM_KV_HEADS
            row_head = row * NUM_KV_HEADS + entry % NUM_KV_HEADS
            is_within = num_pages <= tl.load(budgets_ptr + row_head, is_entry, other=0)
            window = (entry // NUM_KV_HEADS).to(tl.int64) * windows_layer_stride + row_head * WIDTH
            last_page = (num_pages - 1).to(tl.int32)
            tl.store(windows_ptr + window + last_page, last_page, is_entry & is_within)

        # One program lists the opened pages of the whole batch: the count needs neither a reset nor atomics.
        if request == 0:
            count = 0
            for first in range(0, batch_size, BLOCK_REQUESTS):
                requests = first + tl.arange(0, BLOCK_REQUESTS)
                is_real = tl.load(rows_ptr + requests, requests < batch_size, other=0) > 0
                new_slots = tl.load(slots_ptr + requests, requests < num_slots, other=1).to(tl.int64)
                is_opened = (is_real & (new_slots % PAGE_SIZE == 0)).to(tl.int32)
                position = count + tl.cumsum(is_opened, 0) - is_opened
                heads = tl.arange(0, BLOCK_HEADS)[None, :]
                pairs = (new_slots // PAGE_SIZE)[:, None] * NUM_KV_HEADS + heads
                is_pair = (is_opened > 0)[:, None] & (heads < NUM_KV_HEADS)
                tl.store(opened_pairs_ptr + position[:, None] * NUM_KV_HEADS + heads, pairs, is_pair)
                count += tl.sum(is_opened, 0)
            tl.store(opened_count_ptr, count * NUM_KV_HEADS)
