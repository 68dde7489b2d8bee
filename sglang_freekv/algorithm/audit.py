"""Audit: compare every block with its host page and every window with its rule."""

from __future__ import annotations

import torch

from freekv_kernels import Batch, Count, FlagList, Half, window_pairs
from sglang_freekv.algorithm.decode import Decode
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import Layer

# Compared at a time, to bound the memory of the comparison.
_BLOCKS_PER_CHUNK = 4096


class AuditError(RuntimeError):
    """The engine broke one of its invariants."""


def audit_blocks(memory: KVMemory) -> None:
    """Raise AuditError where a resident block differs from its host page, bit for bit, in a written token.

    The comparison runs on the CPU; reading the blocks waits for the device to have written both.
    """
    try:
        memory.check_integrity()
    except RuntimeError as error:
        raise AuditError(str(error)) from error
    g = memory.geometry
    bits = torch.int16 if g.dtype.itemsize == 2 else torch.int32
    offsets, filled = torch.arange(g.page_size), memory.host.filled.cpu()
    for layer, block_kv in enumerate(memory.blocks.kv):
        owner = memory.blocks.owner(layer).cpu()
        for blocks in (owner >= 0).nonzero().flatten().split(_BLOCKS_PER_CHUNK):
            pairs = owner[blocks]
            pages, heads = pairs // g.num_kv_heads, pairs % g.num_kv_heads
            on_device = block_kv[blocks.to(block_kv.device)].cpu().view(bits)
            records = memory.host.kv[pages, layer, heads]
            on_host = g.codec.decode(records, g.dtype).view(bits)  # [n, 2, page_size, head_dim]
            is_written = (offsets < filled[pages][:, None])[:, None, :, None]
            is_wrong = ((on_host != on_device) & is_written).flatten(1).any(1).nonzero().flatten()
            if len(is_wrong):
                i = is_wrong[0]
                raise AuditError(
                    f"layer {layer}: block {int(blocks[i])} differs from host page {int(pages[i])}, "
                    f"KV head {int(heads[i])} ({len(is_wrong)} such blocks)"
                )


def audit_index(memory: KVMemory, pages: torch.Tensor, groups: torch.Tensor) -> None:
    """Raise AuditError where the index of a page is not what its keys on the host say.

    Parameters
    ----------
    pages : int64
    groups : int64, ``[n, GROUP_PAGES]``
        As `KVMemory.seal` was told of those that end with one of `pages`; -1 for no group.
    """
    pages, groups, filled = pages.cpu(), groups.cpu(), memory.host.filled.cpu()
    pages = pages[filled[pages] > 0].unique()
    last = groups[:, -1]
    groups = groups[(last >= 0) & (filled[last] == memory.geometry.page_size)]
    for layer in memory.layers:
        if layer.kind.sliding_window is not None:  # it has no index
            continue
        try:
            memory.index.audit(layer.number, layer.store, pages, filled[pages], groups)
        except RuntimeError as error:
            raise AuditError(str(error)) from error


def audit_windows(decode: Decode) -> None:
    """Raise AuditError where a window of the step just run breaks its rule.

    Front windows must have their form: sink, ascending pages, recent, within the budget; those of a layer with a
    sliding window are its latest pages, each in a block. Back windows must be what this step's queries select, or in
    rows that were not scored the front windows. Where budgets follow the mass, they must be what these queries ask for,
    and the rows of a request together must have no more than its budgets.
    """
    memory, plan = decode.memory, decode.last_plan
    batch = plan.batch
    if absent := memory.counters[Count.ABSENT_PAGES]:
        raise AuditError(f"{absent} pages were absent when attention ran")
    (front,), (back,) = (half.indices(int(batch.step)) for half in (Half.FRONT, Half.BACK))
    is_over_next = batch.num_pages_next[:, None] > batch.budget_pages
    for layer in memory.layers:
        if layer.kind.sliding_window is not None:
            _audit_sliding(layer, batch, front)
        if (selector := decode.selectors.get(layer.kind)) is None:
            continue
        # Candidates were listed beside the windows that the step found, which are no more where it corrected.
        is_exempt = plan.flags[layer.number].is_flagged.view_as(batch.budget_pages) & (memory.config.candidates > 0)
        scale, present = decode.scales[layer.number], plan.batch_at(layer.number, Half.FRONT)
        _audit_form(memory, present, layer.number, layer.windows[front, batch.rows].long())
        again, ahead, shares = layer._replace(windows=layer.windows.clone()), batch, None
        if plan.rows is not None:
            _audit_sum(batch, present, layer.number)
            again = again._replace(row_budgets=layer.row_budgets.clone())
            shares = selector.score(layer, batch, Half.BACK, scale)
            ahead = selector.apportion(again, batch, Half.BACK, shares, torch.empty_like(batch.budget_pages))
            _audit_sum(batch, ahead, layer.number)
            is_known = plan.todo.selects and not is_exempt.any()
            if is_known and not torch.equal(again.row_budgets, layer.row_budgets):
                raise AuditError(f"layer {layer.number}: the budgets of rows are not what q asks for")
        selector.write_windows(again, ahead, Half.BACK, scale, scores=shares)
        if plan.due[layer.number] is not None:
            _audit_pace(memory, batch, layer)
            _keep_others(again, batch, plan.due[layer.number], front, back)
        is_wrong = (
            (again.windows[back, batch.rows] != layer.windows[back, batch.rows]).any(-1) & is_over_next & ~is_exempt
        )
        if is_wrong.any():
            index, head = is_wrong.nonzero()[0].tolist()
            row = int(batch.rows[index])
            raise AuditError(f"layer {layer.number}, row {row}, KV head {head}: the back window is not what q selects")


def _audit_pace(memory: KVMemory, batch: Batch, layer: Layer) -> None:
    """Check that each row waits for less than its interval, and for none that is longer than the longest."""
    interval, left = layer.pace[batch.rows].unbind(-1)
    is_wrong = (interval < 1) | (interval > memory.config.score_interval) | (left < 0) | (left >= interval)
    is_wrong &= (batch.num_pages > 0)[:, None]  # padding has no pages
    if is_wrong.any():
        index, head = is_wrong.nonzero()[0].tolist()
        raise AuditError(
            f"layer {layer.number}, row {int(batch.rows[index])}, KV head {head}: scored at intervals of "
            f"{int(interval[index, head])} steps, {int(left[index, head])} left, at most {memory.config.score_interval}"
        )


def _keep_others(again: Layer, batch: Batch, due: FlagList, front: int, back: int) -> None:
    """Rows that were not scored have the same window in both halves."""
    request, head = (~due.is_flagged).view_as(batch.budget_pages).nonzero(as_tuple=True)
    row = batch.rows[request]
    again.windows[back, row, head] = again.windows[front, row, head]


def _audit_sliding(layer: Layer, batch: Batch, front: int) -> None:
    """Check the windows of a layer whose window slides: the latest pages, in order, and a block of each."""
    window = layer.windows[front, batch.rows].long()  # [batch_size, num_kv_heads, width]
    n, width = batch.num_pages[:, None, None], window.shape[2]
    column = torch.arange(width, device=window.device)
    expected = (n - width).clamp(min=0) + column
    is_page = expected < n
    is_wrong = window != expected.where(is_page, -1)
    pairs, _ = window_pairs(expected.where(is_page, 0).expand_as(window).clone(), batch.page_table, batch.num_pages)
    is_absent = (layer.store.table.view(-1).take(pairs) < 0) & is_page
    for fault, found in {"it is not of the latest pages": is_wrong, "a page of it has no block": is_absent}.items():
        if found.any():
            index, head, _ = found.nonzero()[0].tolist()
            raise AuditError(
                f"layer {layer.number}, row {int(batch.rows[index])}, KV head {head}: wrong sliding window, {fault}: "
                f"{window[index, head].tolist()} at {int(batch.num_pages[index])} pages"
            )


def _audit_sum(batch: Batch, of_rows: Batch, layer: int) -> None:
    """Check that the budgets of rows are, together, no more than those of their requests."""
    num_pages, most = of_rows.budget_pages.sum(1), batch.budget_pages.sum(1)
    if (num_pages > most).any():
        index = int((num_pages > most).nonzero()[0])
        raise AuditError(
            f"layer {layer}, row {int(batch.rows[index])}: windows of {of_rows.budget_pages[index].tolist()} pages, "
            f"together more than {int(most[index])}"
        )


def _audit_form(memory: KVMemory, batch: Batch, layer: int, window: torch.Tensor) -> None:
    """Check front windows ``[batch_size, num_kv_heads, width]``, of the budgets of the batch."""
    sizes = memory.sizes
    column = torch.arange(sizes.width, device=window.device)
    n, budget = batch.num_pages[:, None, None], batch.budget_pages[..., None]
    length = torch.minimum(n, budget)
    is_entry = column < length
    ascends = (window.diff(dim=-1) > 0) | ~is_entry[..., 1:]
    # From both ends: entry i is page i in the sink, and page n - length + i in the recent pages.
    sink_ok = (window == column) | (column >= sizes.sink) | ~is_entry
    recent_ok = (window == column + n - length) | (column < length - sizes.recent) | ~is_entry
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
                f"layer {layer}, row {int(batch.rows[index])}, KV head {head}: wrong window, {name}: "
                f"{window[index, head].tolist()} at {int(batch.num_pages[index])} pages"
            )
