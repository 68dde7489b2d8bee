"""Audit: compare every block with its host page and every window with its rule."""

from __future__ import annotations

import torch

from sglang_freekv.kv_memory import KVMemory
from sglang_freekv.retrieval import DecodePlan, Retrieval

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


def audit_summaries(memory: KVMemory, pages: torch.Tensor) -> None:
    """Raise AuditError where the summary of one of `pages` (int64) is not the min and max of its keys on the host."""
    g = memory.geometry
    pages = pages[memory.host.filled[pages] > 0].unique()
    is_written = torch.arange(g.page_size) < memory.host.filled[pages][:, None]
    is_written = is_written[:, None, :, None]  # of [n, num_kv_heads, page_size, head_dim]
    for layer in range(g.num_layers):
        keys = memory.host.kv[pages, layer, :, 0]
        low = keys.masked_fill(~is_written, float("inf")).amin(2)
        high = keys.masked_fill(~is_written, float("-inf")).amax(2)
        is_wrong = (memory.host.summary[layer, pages] != torch.stack((low, high), 2)).flatten(1).any(1)
        if is_wrong.any():
            raise AuditError(f"layer {layer}: wrong summary of host page {int(pages[is_wrong][0])}")


def audit_windows(retrieval: Retrieval) -> None:
    """Raise AuditError where a window of the step just run breaks its rule.

    Front windows must have their form: sink, ascending pages, recent, within the budget. Back windows must be what this
    step's queries select.
    """
    memory, plan = retrieval.memory, retrieval.last_plan
    if memory.counters.absent_pages:
        raise AuditError(f"{memory.counters.absent_pages} pages were absent when attention ran")
    for layer in range(memory.geometry.num_layers):
        if layer in memory.blocks.dense_layers:
            continue
        _audit_form(memory, plan, layer)
        if len(plan.over_next):
            scores = retrieval.score(layer, memory.windows.last_q[layer][plan.rows])
            back = memory.windows.back(layer)[plan.rows[plan.over_next]]
            is_wrong = (back != retrieval.select(scores, plan.num_pages_next)).any(-1)
            if is_wrong.any():
                index, head = is_wrong.nonzero()[0].tolist()
                row = int(plan.rows[plan.over_next][index])
                raise AuditError(f"layer {layer}, row {row}, KV head {head}: the back window is not what q selects")


def _audit_form(memory: KVMemory, plan: DecodePlan, layer: int) -> None:
    config = memory.config
    column = torch.arange(config.max_budget_pages)
    n, budget = plan.num_pages[:, None, None], memory.windows.budget_pages[plan.rows][:, None, None]
    length = torch.minimum(n, budget)
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
