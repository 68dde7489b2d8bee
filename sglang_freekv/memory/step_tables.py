"""Step tables: what the ops of one decode step hand on, at fixed addresses, as CUDA graphs hold them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from freekv_kernels import GROUP_PAGES, Batch, FlagList, Half, MissList, PairList
from sglang_freekv.memory.geometry import Geometry


class RowBudgets(NamedTuple):
    """What each row of a batch reads in one layer, where its budget follows its attention."""

    front: torch.Tensor  # int64 [batch_size, num_kv_heads], pages of the windows that this step reads
    back: torch.Tensor  # the same of the windows of the next step; written in the step
    kv_indptr: torch.Tensor  # int32 [batch_size * num_kv_heads + 1], where the pages of each row start


class StepTables:
    """Tables and lists of one step, for batches of up to `max_requests`.

    Parameters
    ----------
    width : int
        Entries of a window, pages.
    max_pages : int
        Of one request.
    step : int64, ``[1]``, device
        Number of the decode step.
    num_listed : int or None
        Pages that a row scores one by one, at most; None: all.
    num_scored : int
        Columns of the workspace of scores.
    by_mass : bool
        Whether every layer has budgets of its own for the rows.
    keeps_flags : bool
        Whether every layer's flags are kept until the next step; otherwise one after the other uses the same memory.

    Attributes
    ----------
    opened : PairList
        Of the pages that the step opens.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        width: int,
        max_requests: int,
        max_pages: int,
        step: torch.Tensor,
        num_listed: int | None,
        num_scored: int,
        keeps_flags: bool,
        by_mass: bool = False,
        device: str,
    ) -> None:
        g = self._geometry = geometry
        num_rows = max_requests * g.num_kv_heads
        num_entries = num_rows * width

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows, slots, num_pages, num_pages_next = (zeros(max_requests) for _ in range(4))
        page_table, budgets = zeros(max_requests, max_pages), zeros(max_requests, g.num_kv_heads)
        groups = zeros(max_requests, GROUP_PAGES)
        self._batch = Batch(rows, slots, page_table, num_pages, num_pages_next, budgets, step, groups)
        # Of flags, front and back misses: how many, and the progress of fetching them; of due rows: how many.
        self._counts = zeros(4, g.num_layers, 4, dtype=torch.int32)
        num_kept = g.num_layers if keeps_flags else 1
        self._flags = zeros(num_rows, dtype=torch.int32), zeros(num_kept, num_rows, dtype=torch.bool)
        self._due = zeros(num_rows, dtype=torch.int32), zeros(g.num_layers, num_rows, dtype=torch.bool)
        self._misses = [
            (zeros(num_entries), zeros(num_entries, dtype=torch.int32), zeros(num_entries, dtype=torch.int32))
            for _ in ("front", "back")
        ]
        # Of every layer, at addresses that are multiples of 16 bytes: what kernels were compiled for stays true.
        num_layers = g.num_layers if by_mass else 0
        self._row_budgets = zeros(2, num_layers, max_requests + max_requests % 2, g.num_kv_heads)
        self._kv_indptr = zeros(num_layers, (num_rows // 4 + 1) * 4, dtype=torch.int32)
        self.opened = PairList(zeros(num_rows), zeros(1, dtype=torch.int32))
        shape = (max_requests, g.num_kv_heads, g.group_size, g.head_dim)
        self._queries = None if device == "cpu" else zeros(*shape, dtype=g.dtype)
        # Correction runs beside the speculation of an earlier layer, so each has its own. A CPU runs one after the
        # other, and takes memory for the scores that it needs.
        self._num_listed, halves = num_listed, ("front", "back")
        shape = (num_rows, g.group_size, num_scored)
        self._scores = [None if device == "cpu" else zeros(*shape, dtype=torch.float32) for _ in halves]
        self._lists = [None if device == "cpu" else zeros(num_rows, num_listed or 0, dtype=torch.int32) for _ in halves]

    def batch(self, batch_size: int, max_pages: int | None = None) -> Batch:
        """The tables for a decode step of `batch_size` requests; of `max_pages` pages where no graph holds them."""
        *tables, step, groups = self._batch
        batch = Batch(*(tensor[:batch_size] for tensor in tables), step, groups[:batch_size])
        return batch._replace(page_table=batch.page_table[:, :max_pages])

    def flags(self, batch_size: int) -> list[FlagList]:
        """The lists of flagged rows of all layers, for a batch."""
        return self._lists_of_rows(batch_size, *self._flags, self._counts[0])

    def due(self, batch_size: int) -> list[FlagList]:
        """The lists of the rows that are scored in the step, of all layers, for a batch."""
        return self._lists_of_rows(batch_size, *self._due, self._counts[3])

    def _lists_of_rows(
        self, batch_size: int, rows: torch.Tensor, is_listed: torch.Tensor, counts: torch.Tensor
    ) -> list[FlagList]:
        num_rows = batch_size * self._geometry.num_kv_heads
        per_layer = is_listed[:, :num_rows].expand(self._geometry.num_layers, -1)
        return [FlagList(rows[:num_rows], *of_layer) for of_layer in zip(counts[:, :1], per_layer, strict=True)]

    def row_budgets(self, batch: Batch, of_layers: torch.Tensor) -> list[RowBudgets] | None:
        """Snapshot the budgets of a batch's rows in every layer; None where rows have those of their requests.

        Parameters
        ----------
        of_layers : int64, ``[num_layers, max_requests + 1, num_kv_heads]``, device
            Pages of the windows that the step reads.
        """
        if len(of_layers) == 0:
            return None
        batch_size, num_kv_heads = batch.budget_pages.shape
        front, back = self._row_budgets[:, :, :batch_size]
        front.copy_(of_layers[:, batch.rows])
        kv_indptr = self._kv_indptr[:, : batch_size * num_kv_heads + 1]
        num_read = torch.minimum(batch.num_pages[:, None], front).clamp_(min=1)  # padding reads one page
        kv_indptr[:, 1:] = num_read.flatten(1).cumsum(1)
        return [RowBudgets(*of_layer) for of_layer in zip(front, back, kv_indptr, strict=True)]

    def queries(self, batch_size: int) -> torch.Tensor | None:
        """Where a layer's queries are contiguous: model dtype, ``[batch_size, num_kv_heads, group_size, head_dim]``.

        None on a CPU, whose attention takes them as they are.
        """
        return None if self._queries is None else self._queries[:batch_size]

    def misses(self, number: int, half: Half) -> MissList:
        """A layer's list of missing pages; layers use the same memory one after the other, each with its own count."""
        pairs, entries, blocks = self._misses[half]
        counts = self._counts[1 + half, number]
        return MissList(pairs, counts[:1], entries, blocks, counts[1:])

    def scores(self, half: Half, num_rows: int) -> torch.Tensor | None:
        """Workspace for the scores of so many rows: float32, ``[num_rows, group_size, max_pages]``.

        Where pages are listed, at least as wide as the list, and as there are groups. None on a CPU, and for BOTH,
        whose scores prefill allocates: take what is needed.
        """
        workspace = None if half == Half.BOTH else self._scores[half]
        return None if workspace is None else workspace[:num_rows]

    def list_of_pages(self, half: Half, batch: Batch) -> torch.Tensor | None:
        """Where the pages are listed that are scored one by one: int32, ``[num_rows, num_listed]``; None: all are."""
        if self._num_listed is None or self._num_listed >= batch.page_table.shape[1]:
            return None
        num_rows, workspace = batch.budget_pages.numel(), None if half == Half.BOTH else self._lists[half]
        if workspace is None:
            return torch.empty((num_rows, self._num_listed), dtype=torch.int32, device=batch.rows.device)
        return workspace[:num_rows]

    def clear(self) -> None:
        """Empty the lists of all layers."""
        self._counts.zero_()

    @property
    def nbytes(self) -> int:
        scores = sum(tensor.nbytes for tensor in self._scores if tensor is not None)
        lists = sum(tensor.nbytes for lists in self._misses for tensor in lists)
        listed = sum(tensor.nbytes for tensor in self._lists if tensor is not None)
        by_mass = self._row_budgets.nbytes + self._kv_indptr.nbytes
        queries = 0 if self._queries is None else self._queries.nbytes
        return queries + scores + listed + lists + by_mass + self._batch.page_table.nbytes
