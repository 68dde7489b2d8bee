"""Look the pages of windows up in the block table: what attention reads, and what is missing."""

from __future__ import annotations

import torch

from freekv_kernels.tables import Batch, BlockTables, Count, FlagList, Half, MissList


def lookup_blocks(
    windows: torch.Tensor,
    batch: Batch,
    half: Half,
    blocks: BlockTables,
    misses: MissList,
    counters: torch.Tensor,
    flags: FlagList | None = None,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
) -> None:
    """Find the block of every window entry, mark it as used, and list the entries that have none.

    A row has as many entries as kv_indptr says (FRONT), or as its budget. An entry is valid if its page exists:
    0 <= page < num_pages.

    FRONT: the windows of this step, of all requests. kv_indices receives the blocks of the entries that a row attends
    to, 0 where there is none. Blocks are stamped 2 * step, and 2 * step + 1 for rows within their budget at the next
    step, which read them again.
    BACK: the windows of the next step, of rows over their budget then; stamped 2 * step + 1.
    BOTH: the first windows of all requests; stamped 2 * step + 1.

    Parameters
    ----------
    windows : int32, ``[2, max_requests + 1, num_kv_heads, max_budget_pages]``, device
    batch : Batch
    half : Half
    blocks : BlockTables, of one layer
        `last_used` is raised to the stamp, never lowered.
    misses : MissList
        pairs, entries and count are written; `count` must be 0 before.
    counters : int64, ``[len(Count)]``, device
        BACK, BOTH, and the flagged rows of FRONT advance HITS and MISSES by their valid entries; the other rows of
        FRONT advance DEMAND_MISSES by those without a block.
    flags : FlagList
        For FRONT.
    kv_indptr : int32, ``[batch_size * num_kv_heads + 1]``, device
        For FRONT: where each row's entries start; a row attends to the first entries of its window, and padding to
        one that it does not have.
    kv_indices : int32, ``[>= kv_indptr[-1]]``, device
        For FRONT: written.
    """
    num_kv_heads, device = windows.shape[2], windows.device
    rows, num_pages, page_table = batch.rows, batch.num_pages, batch.page_table
    is_within = batch.num_pages_next[:, None] <= batch.budget_pages  # [batch_size, num_kv_heads]
    num_entries = batch.budget_pages
    if half == Half.FRONT:
        num_entries = kv_indptr.diff().view(-1, num_kv_heads)
    if half == Half.BACK and is_within.any():
        if is_within.all():
            return
        is_read = ~is_within.all(1)
        num_entries = num_entries.where(~is_within, 0)
        rows, num_pages, page_table, num_entries = (x[is_read] for x in (rows, num_pages, page_table, num_entries))
    width, index = int(num_entries.max()), (int(batch.step) + (half != Half.FRONT)) % 2
    window = windows[index].index_select(0, rows)[..., :width].long()  # [n, num_kv_heads, width]
    is_entry = torch.arange(width, device=device) < num_entries[..., None]
    pairs, is_page = window_pairs(window, page_table, num_pages)
    is_valid = is_page & is_entry
    found = blocks.table.view(-1).take(pairs).where(is_valid, -1)
    is_found, held = found >= 0, found.clamp(min=0)

    stamp = 2 * int(batch.step) + (is_within[..., None].int() if half == Half.FRONT else 1)
    stamps = torch.where(is_found, stamp, -1).int()  # raises no stamp where there is no block
    blocks.last_used.view(-1).scatter_reduce_(0, held.flatten().long(), stamps.flatten(), "amax")
    if half == Half.FRONT:
        entries = held.flatten() if is_entry.all() else held[is_entry]
        kv_indices[: len(entries)] = entries
    is_flagged = flags.is_flagged.view(-1, num_kv_heads, 1) if half == Half.FRONT else is_valid
    if is_flagged.any():
        counters[Count.HITS] += (is_found & is_flagged).sum()
    if is_found.equal(is_valid):
        return

    is_missing = is_valid & ~is_found
    missing, flagged = int(is_missing.sum()), int((is_missing & is_flagged).sum())
    counters[Count.MISSES] += flagged
    counters[Count.DEMAND_MISSES] += missing - flagged
    misses.pairs[:missing] = pairs[is_missing]
    misses.count.fill_(missing)
    if half == Half.FRONT:
        entries = kv_indptr[:-1].view(-1, num_kv_heads, 1) + torch.arange(width, device=device)
        misses.entries[:missing] = entries[is_missing].int()


def window_pairs(
    window: torch.Tensor, page_table: torch.Tensor, num_pages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of the pages that windows list. Decides nothing on the host, so a CUDA graph can hold it.

    Parameters
    ----------
    window : int64, ``[batch_size, num_kv_heads, width]``, device
        Logical pages; used up.
    page_table : int64, ``[batch_size, max_pages]``, device
    num_pages : int64, ``[batch_size]``, device

    Returns
    -------
    pairs : int64, ``[batch_size, num_kv_heads, width]``
        Host page * num_kv_heads + head; an existing pair, but of another page, where the page does not exist.
    is_page : bool, ``[batch_size, num_kv_heads, width]``
        Whether the page exists: 0 <= page < num_pages.
    """
    num_kv_heads = window.shape[1]
    is_page = (window >= 0) & (window < num_pages[:, None, None])
    pairs = page_table.gather(1, window.clamp_(0, page_table.shape[1] - 1).flatten(1)).view_as(window)
    pairs.mul_(num_kv_heads).add_(torch.arange(num_kv_heads, device=window.device)[:, None])
    return pairs, is_page


def lookup_pairs(pairs: torch.Tensor, blocks: BlockTables, step: torch.Tensor, kv_indices: torch.Tensor) -> bool:
    """What `lookup_blocks` does in FRONT where every request reads all its pages, now and in the next step.

    kv_indices[i] = table[pairs[i]], and the block is stamped 2 * step + 1; nothing, if any pair has no block.

    Parameters
    ----------
    pairs : int64, ``[n]``, device
        In the order of kv_indices; the same for all layers, so they are listed once per step.
    blocks : BlockTables, of one layer
    step : int64, ``[1]``, device
    kv_indices : int32, ``[>= n]``, device
        Written.

    Returns
    -------
    bool
        Whether every pair has a block.
    """
    found = blocks.table.view(-1).take(pairs)
    if found.min() < 0:
        return False
    blocks.last_used.view(-1).index_fill_(0, found.long(), 2 * int(step) + 1)
    kv_indices[: len(found)] = found
    return True
