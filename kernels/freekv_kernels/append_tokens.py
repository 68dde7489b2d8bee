"""Append one decoded token per request, encode what that fills, and say which KV heads have moved or are due."""

from __future__ import annotations

import torch

from freekv_kernels.compare_queries import compare_queries
from freekv_kernels.encode_pages import encode_pages
from freekv_kernels.fp8 import decode_fp8, encode_bounds
from freekv_kernels.score_pages import list_rows
from freekv_kernels.tables import Batch, Count, FlagList, PageStore


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
    """Write-through append of one token per request; which rows have moved, and which are scored in this step.

    With page, offset = divmod(slot, page_size), for every KV head h:
      the record of (page, h) takes k, v at offset
      summary[page, h] = k, k where offset == 0, else min(., k), max(., k); rounded outwards, see `fp8`
      block_kv[table[page, h], :, offset] = what the record reads back as, where the page's head is resident
      codes[page, h] = those of its keys, where it is full: `encode_pages`
      is_flagged = num_pages > budget_pages[h] and mean over the group of cos(q, last_q[row]) < tau
      is_due = num_pages_next > budget_pages[h] and (pace[row, h, 1] == 0 or num_pages_next > num_pages)
      pace[row, h, 1] -= 1, in other rows over their next budget
      last_q[row, h] = queries[request, h] = q

    Parameters
    ----------
    q : model dtype, ``[batch_size, num_kv_heads, group_size, head_dim]``, device
    k, v : model dtype, ``[batch_size, num_kv_heads, head_dim]``, device
        Post-RoPE queries and keys, and values, of the new tokens.
    batch : Batch
    tau : float or None
        None: no row is flagged.
    store : PageStore
        Of one layer, written. Where a page's head is not resident, the host store holds the only copy, which a demand
        miss fetches.
    last_q : model dtype, ``[max_requests + 1, num_kv_heads, group_size, head_dim]``, device
    flags : FlagList or None
        Written; `count` must be 0 before. None in a dense layer, where nothing is selected, flagged or counted.
    counters : int64, ``[len(Count)]``, device
        ROWS, PAGES_READ (by the budgets of ROWS), FLAGGED_ROWS, SCORED_ROWS and SCORED_PAGES are advanced.
    queries : model dtype, ``[batch_size, num_kv_heads, group_size, head_dim]``, device, contiguous, optional
        Written, in a dense layer too: a library's attention reads no slices of a fused projection.
    codes, groups : optional
        See `encode_pages`, with `batch.slots`. None: no page is encoded.
    pace : int32, ``[max_requests + 1, num_kv_heads, 2]``, device, optional
        Steps from one scoring of a row to the next, and steps that are left before it. None: every row over its next
        budget is due.
    due : FlagList, optional, with `pace`
        Written; `count` must be 0 before.

    Notes
    -----
    The page of a request's last token belongs to it alone, so no two requests write to one page. Padding writes to
    the padding page and the padding row, which nobody reads.
    """
    page_size = store.block_kv.shape[2]
    pages, offsets = batch.slots // page_size, batch.slots % page_size
    kv = torch.stack((k, v), 2)  # [batch_size, num_kv_heads, 2, head_dim]
    kv = store.codec.write_tokens(store.host_kv, pages, offsets, kv)
    if store.summary is not None:
        _fold(store.summary, k, pages, offsets)

    blocks = store.table.index_select(0, pages).long()  # [batch_size, num_kv_heads]
    if blocks.min() >= 0:
        store.block_kv[blocks, :, offsets[:, None]] = kv
    else:
        request, head = (blocks >= 0).nonzero(as_tuple=True)
        store.block_kv[blocks[request, head], :, offsets[request]] = kv[request, head]

    if codes is not None:
        encode_pages(batch.slots, store, codes, groups)
    if queries is not None:
        queries.copy_(q)
    if flags is None:
        return
    is_over = batch.num_pages[:, None] > batch.budget_pages
    flags.is_flagged.zero_()
    if num_over := int(is_over.sum()):
        counters[Count.ROWS] += num_over
        counters[Count.PAGES_READ] += batch.budget_pages[is_over].sum()
        if tau is not None:
            is_flagged = is_over & (compare_queries(q, last_q[batch.rows]) < tau)
            list_rows(is_flagged.flatten(), flags)
            counters[Count.FLAGGED_ROWS] += is_flagged.sum()
    last_q.index_copy_(0, batch.rows, q)
    is_due = _find_due(batch, pace)
    counters[Count.SCORED_ROWS] += is_due.sum()
    counters[Count.SCORED_PAGES] += (is_due * batch.num_pages[:, None]).sum()
    if due is not None:
        list_rows(is_due.flatten(), due)


def _find_due(batch: Batch, pace: torch.Tensor | None) -> torch.Tensor:
    """Which rows are scored in this step, bool ``[batch_size, num_kv_heads]``; others wait a step less."""
    is_over = batch.num_pages_next[:, None] > batch.budget_pages
    if pace is None:
        return is_over
    left = pace[batch.rows, :, 1]
    is_due = is_over & ((left == 0) | (batch.num_pages_next > batch.num_pages)[:, None])
    pace[batch.rows, :, 1] = left - (is_over & ~is_due).int()
    return is_due


def _fold(summary: torch.Tensor, k: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor) -> None:
    """Fold one key per page into the summaries; the token at offset 0 opens its page."""
    k = k.float()
    known = decode_fp8(summary.index_select(0, pages)).where((offsets > 0)[:, None, None, None], k[:, :, None])
    low, high = known.unbind(2)
    summary.index_copy_(0, pages, encode_bounds(torch.minimum(low, k), torch.maximum(high, k)))
