"""Fetch what windows lack: look their pages up, claim blocks for those that have none, and recall these."""

from __future__ import annotations

import torch

from freekv_kernels.claim_blocks import claim_blocks
from freekv_kernels.lookup_blocks import lookup_blocks
from freekv_kernels.recall_blocks import recall_blocks
from freekv_kernels.tables import Batch, BlockTables, Claim, FlagList, Half, MissList, PageStore


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
    """Give every page of the windows a block that holds it, as far as there are blocks.

    What `lookup_blocks`, `claim_blocks` and `recall_blocks` do one after the other: every row is looked up before any
    block is taken, so no row loses a block that it has found. Claims are IN_STEP for FRONT and BACK, and BETWEEN_STEPS
    for BOTH, the first windows of requests whose prompts are complete.

    Parameters
    ----------
    windows, batch, half, flags, kv_indptr
        As in `lookup_blocks`.
    store : PageStore
        Of one layer; its blocks are written.
    blocks : BlockTables
        Of that layer, with the leading dimension.
    misses : MissList
        Written; `count` and `progress` must be 0 before.
    counters : int64, ``[len(Count)]``, device
        Advanced as by the three.
    kv_indices : int32, ``[>= kv_indptr[-1]]``, device
        For FRONT: written with the blocks of the entries that a row attends to, 0 where there is none.
    """
    lists = (flags, kv_indptr, kv_indices)
    lookup_blocks(windows, batch, half, blocks, misses, counters, *lists)
    # Of the front, too, claimed blocks are stamped for the next step: requests within their budget read them again.
    claim_blocks(misses, blocks, batch.step, claim_of(half), counters)
    recall_blocks(store, misses, counters, kv_indices)


def claim_of(half: Half) -> Claim:
    """How blocks are claimed for the windows of a half."""
    return Claim.BETWEEN_STEPS if half == Half.BOTH else Claim.IN_STEP
