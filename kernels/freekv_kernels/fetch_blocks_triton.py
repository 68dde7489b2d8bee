"""Kernel of fetch_blocks: lookups, claims and recalls as programs of one launch, in the order of tickets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freekv_kernels.claim_pairs_triton import claim_pairs, num_claim_programs, search_sizes
from freekv_kernels.dependent_launch_triton import dependent_launch, wait_for_the_kernel_before
from freekv_kernels.fetch_blocks import claim_of
from freekv_kernels.lookup_blocks_triton import look_up_row
from freekv_kernels.recall_blocks_triton import copy_sizes, num_recall_programs, recall_misses
from freekv_kernels.tables import Batch, BlockTables, FlagList, Half, MissList, PageStore

# Five programs fit on a multiprocessor; without a bound ptxas makes room for seven, and spills.
_MAX_REGISTERS = 96


@triton.jit
def _arrive(count_ptr):
    """Say that this program is done with its part: who waits for it sees what all threads of it have written."""
    tl.debug_barrier()
    tl.atomic_add(count_ptr, 1, sem="release")


@triton.jit
def _wait_for(count_ptr, num_programs):
    """Wait until so many programs have arrived, and see what they have written."""
    while tl.atomic_add(count_ptr, 0, sem="acquire") < num_programs:
        pass


@triton.jit(
    do_not_specialize=["page_table_stride", "num_blocks", "num_rows", "num_claims"],
    do_not_specialize_on_alignment=[
        "windows_ptr",
        "table_ptr",
        "owner_ptr",
        "last_used_ptr",
        "free_blocks_ptr",
        "num_free_ptr",
        "hand_ptr",
        "miss_count_ptr",
        "progress_ptr",
    ],
)
def _fetch_blocks_kernel(
    windows_ptr,
    rows_ptr,
    page_table_ptr,
    num_pages_ptr,
    num_pages_next_ptr,
    budget_pages_ptr,
    step_ptr,
    is_flagged_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    table_ptr,
    owner_ptr,
    last_used_ptr,
    free_blocks_ptr,
    num_free_ptr,
    hand_ptr,
    miss_pairs_ptr,
    miss_entries_ptr,
    miss_blocks_ptr,
    miss_count_ptr,
    progress_ptr,
    host_kv_ptr,
    block_kv_ptr,
    counters_ptr,
    windows_half_stride,
    windows_row_stride,
    page_table_stride,
    host_page_stride,
    host_head_stride,
    num_blocks,
    num_rows,
    num_claims,
    NUM_KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HALF: tl.constexpr,
    PROTECT_BACK: tl.constexpr,
    STAMP_BACK: tl.constexpr,
    PAIRS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    MAX_TURNS: tl.constexpr,
    WIDE: tl.constexpr,
    RUN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CODEC: tl.constexpr,
):
    wait_for_the_kernel_before()
    # The first tickets look up and wait for nobody, the next ones claim when all have looked up, the last ones copy
    # when all have claimed. So a program waits for lower tickets only. Whoever has one of these runs already, in
    # whatever order programs start and however few run at once; and the lowest of all that run waits for nobody.
    ticket = tl.atomic_add(progress_ptr, 1, sem="relaxed")
    looked_up_ptr, claimed_ptr = progress_ptr + 1, progress_ptr + 2
    claim, recall = ticket - num_rows, ticket - num_rows - num_claims
    if claim < 0:
        look_up_row(
            ticket,
            windows_ptr,
            rows_ptr,
            page_table_ptr,
            num_pages_ptr,
            num_pages_next_ptr,
            budget_pages_ptr,
            step_ptr,
            table_ptr,
            is_flagged_ptr,
            kv_indptr_ptr,
            last_used_ptr,
            miss_pairs_ptr,
            miss_entries_ptr,
            miss_count_ptr,
            kv_indices_ptr,
            counters_ptr,
            windows_half_stride,
            windows_row_stride,
            page_table_stride,
            NUM_KV_HEADS,
            WIDTH,
            BLOCK_W,
            HALF,
        )
        _arrive(looked_up_ptr)
    elif recall < 0:
        _wait_for(looked_up_ptr, num_rows)
        claim_pairs(
            claim,
            num_claims,
            miss_pairs_ptr,
            miss_count_ptr,
            step_ptr,
            table_ptr,
            owner_ptr,
            last_used_ptr,
            free_blocks_ptr,
            num_free_ptr,
            hand_ptr,
            miss_blocks_ptr,
            counters_ptr,
            num_blocks,
            PROTECT_BACK,
            STAMP_BACK,
            PAIRS,
            CANDIDATES,
            MAX_TURNS,
            WIDE,
        )
        _arrive(claimed_ptr)
    else:
        _wait_for(looked_up_ptr, num_rows)
        if recall < tl.load(miss_count_ptr):  # where nothing is missing nobody waits for claims
            _wait_for(claimed_ptr, num_claims)
            recall_misses(
                recall,
                tl.num_programs(0) - num_rows - num_claims,
                host_kv_ptr,
                miss_pairs_ptr,
                miss_entries_ptr,
                miss_blocks_ptr,
                miss_count_ptr,
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


def fetch_blocks(
    windows: torch.Tensor,
    batch: Batch,
    half: Half,
    store: PageStore,
    blocks: BlockTables,
    misses: MissList,
    counters: torch.Tensor,
    flags: FlagList | None = None,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
) -> None:
    """See `freekv_kernels.fetch_blocks`. The grid depends on the batch size only: a CUDA graph can hold it.

    No other kernel may work on the same layer's tables at the same time.
    """
    num_kv_heads, width = windows.shape[2:]
    num_rows, claim = len(batch.rows) * num_kv_heads, claim_of(half)
    num_entries = num_rows * width
    num_claims, num_recalls = num_claim_programs(num_entries), num_recall_programs(num_entries)
    _fetch_blocks_kernel[(num_rows + num_claims + num_recalls,)](
        windows,
        batch.rows,
        batch.page_table,
        batch.num_pages,
        batch.num_pages_next,
        batch.budget_pages,
        batch.step,
        flags.is_flagged if flags else None,
        kv_indptr,
        kv_indices,
        *blocks,
        misses.pairs,
        misses.entries,
        misses.blocks,
        misses.count,
        misses.progress,
        store.host_kv,
        store.block_kv,
        counters,
        *windows.stride()[:2],
        batch.page_table.stride(0),
        *store.host_kv.stride()[:2],
        blocks.owner.shape[1],
        num_rows,
        num_claims,
        NUM_KV_HEADS=num_kv_heads,
        WIDTH=width,
        BLOCK_W=triton.next_power_of_2(width),
        HALF=int(half),
        PROTECT_BACK=claim.protect_back,
        STAMP_BACK=claim.stamp_back,
        **search_sizes(),
        **copy_sizes(store),
        num_warps=4,
        maxnreg=_MAX_REGISTERS,
        **(dependent_launch() if half == Half.FRONT else {}),  # the others follow a fork, not a kernel
    )
