"""Budgets: how many pages each (request, KV head) attends to."""

from __future__ import annotations

import torch


class Budgets:
    """Pages by row of the request table and KV head; row 0 is padding. Every head of a request has the same.

    Attributes
    ----------
    pages : int64, ``[max_requests + 1, num_kv_heads]``, device
        What the ops read.
    """

    def __init__(self, max_requests: int, num_kv_heads: int, max_budget_pages: int, device: str) -> None:
        self._num_kv_heads = num_kv_heads
        self._of_rows = [[max_budget_pages] * num_kv_heads] * (max_requests + 1)  # the host's copy
        shape = (max_requests + 1, num_kv_heads)
        self.pages = torch.full(shape, max_budget_pages, dtype=torch.int64, device=device)

    def admit(self, row: int, budget_pages: int) -> None:
        """A request takes a row of the request table. The device hears of its budgets when it starts to decode: the
        last step of the row's last owner may not have run yet."""
        self._of_rows[row] = self.share(budget_pages)

    def share(self, budget_pages: int) -> list[int]:
        """Pages of each head of a request that asked for `budget_pages`; another policy overrides this."""
        return [budget_pages] * self._num_kv_heads

    def of(self, row: int) -> list[int]:
        """Pages of each head of a row, without asking the device."""
        return self._of_rows[row]

    def start(self, rows: torch.Tensor, budget_pages: torch.Tensor) -> None:
        """Requests start to decode, in the order of the forward passes.

        Parameters
        ----------
        rows : int64, ``[n]``, device
        budget_pages : int64, ``[n, num_kv_heads]``, device
        """
        self.pages.index_copy_(0, rows, budget_pages)
