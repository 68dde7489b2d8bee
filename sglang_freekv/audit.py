"""Audit: compare every block with its host page and every window with its rule."""

from __future__ import annotations

import torch

from sglang_freekv.kv_memory import KVMemory
from sglang_freekv.retrieval import DecodePlan

# Compared at a time, to bound the memory of the comparison.
_BLOCKS_PER_CHUNK = 4096


class AuditError(RuntimeError):
    """The engine broke one of its invariants."""


def audit_blocks(memory: KVMemory) -> None:
    """Raise AuditError where a resident block differs from its host page, bit for bit, in a written token."""
    memory.check_integrity()
    g = memory.geometry
    bits = torch.int16 if g.dtype.itemsize == 2 else torch.int32
    offsets = torch.arange(g.page_size)
    for layer, owner in enumerate(memory.blocks.owner):
        for blocks in (owner >= 0).nonzero().flatten().split(_BLOCKS_PER_CHUNK):
            keys = owner[blocks].long()
            pages, heads = keys // g.num_kv_heads, keys % g.num_kv_heads
            on_host = memory.host.kv[pages, layer, heads].view(bits)  # [n, 2, page_size, head_dim]
            on_device = memory.blocks.kv[layer][blocks].view(bits)
            is_written = (offsets < memory.host.filled[pages][:, None])[:, None, :, None]
            is_wrong = ((on_host != on_device) & is_written).flatten(1).any(1).nonzero().flatten()
            if len(is_wrong):
                i = is_wrong[0]
                raise AuditError(
                    f"layer {layer}: block {int(blocks[i])} differs from host page {int(pages[i])}, "
                    f"KV head {int(heads[i])} ({len(is_wrong)} such blocks)"
                )


def audit_windows(memory: KVMemory, plan: DecodePlan) -> None:
    """Raise AuditError where a front window of the step breaks its rule: sink, ascending pages, recent, within budget."""
    if memory.counters.absent_pages:
        raise AuditError(f"{memory.counters.absent_pages} pages were absent when attention ran")
    config = memory.config
    column = torch.arange(config.max_budget_pages)
    n, budget = plan.num_pages[:, None, None], memory.windows.budget_pages[plan.rows][:, None, None]
    length = torch.minimum(n, budget)
    for layer in range(memory.geometry.num_layers):
        if layer in memory.blocks.dense_layers:
            continue
        window = memory.windows.front(layer)[plan.rows].long()  # [batch_size, num_kv_heads, max_budget_pages]
        is_entry = column < length
        ascends = (window.diff(dim=-1) > 0) | ~is_entry[..., 1:]
        # From both ends: entry i is page i in the sink, and page n - length + i in the recent pages.
        sink_ok = (window == column) | (column >= config.sink_pages) | ~is_entry
        recent_ok = (window == column + n - length) | (column < length - config.recent_pages) | ~is_entry
        padding_ok = (window == -1) | is_entry
        everything_ok = (window == column) | ~is_entry | (n > budget)
        for name, is_ok in {
            "its pages do not ascend": ascends,
            "a sink page is missing": sink_ok,
            "a recent page is missing": recent_ok,
            "it is longer than the budget": padding_ok,
            "a page of a request within its budget is missing": everything_ok,
        }.items():
            if not is_ok.all():
                index, head, _ = (~is_ok).nonzero()[0].tolist()
                raise AuditError(
                    f"layer {layer}, row {int(plan.rows[index])}, KV head {head}: wrong window, {name}: "
                    f"{window[index, head].tolist()} at {plan.seq_lens[index]} tokens"
                )
