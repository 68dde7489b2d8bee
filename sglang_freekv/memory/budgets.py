"""Budgets: how many pages each (request, KV head) attends to."""

from __future__ import annotations

import torch

from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.windows import WindowSizes


class Budgets:
    """Pages by row of the request table and KV head; row 0 is padding. Every head of a request has the same.

    Where a request has a mass, they bound the sum over its heads, and the pages of each head follow its attention.

    Parameters
    ----------
    geometry : Geometry
    max_requests : int
    sizes : WindowSizes
    mass : float or None
        Of a request that asks for none; None: no request has one.
    device : str

    Attributes
    ----------
    pages : int64, ``[max_requests + 1, num_kv_heads]``, device
        What the ops read.
    masses : float32, ``[max_requests + 1]``, device
        Share of the attention that budgets follow; 0: they do not.
    of_layers : int64, ``[num_layers, max_requests + 1, num_kv_heads]``, device
        Pages of the windows that were written last: see the op `apportion_pages`. Empty where no request has a mass.
    """

    def __init__(
        self, geometry: Geometry, max_requests: int, sizes: WindowSizes, mass: float | None, device: str
    ) -> None:
        self._num_kv_heads, self._sizes, self._mass = geometry.num_kv_heads, sizes, mass or 0.0
        shape = (max_requests + 1, geometry.num_kv_heads)
        self._of_rows = [[sizes.max_budget] * shape[1]] * shape[0]  # the host's copy
        self._masses = [0.0] * shape[0]  # the host's copy
        self.pages = torch.full(shape, sizes.max_budget, dtype=torch.int64, device=device)
        self.masses = torch.zeros(shape[0], device=device)
        num_layers = 0 if mass is None else geometry.num_layers
        self.of_layers = torch.full((num_layers, *shape), sizes.max_budget, dtype=torch.int64, device=device)

    def admit(self, row: int, budget_pages: int, mass: float | None = None) -> None:
        """A request takes a row of the request table. The device hears of its budgets when it starts to decode: the
        last step of the row's last owner may not have run yet."""
        self._of_rows[row] = self.share(budget_pages)
        self._masses[row] = self._mass if mass is None else mass

    def share(self, budget_pages: int) -> list[int]:
        """Pages of each head of a request that asked for `budget_pages`; another policy overrides this."""
        return [budget_pages] * self._num_kv_heads

    def of(self, row: int) -> list[int]:
        """Pages of each head of a row, without asking the device; with a mass, their mean over the heads is bounded."""
        return self._of_rows[row]

    def mass_of(self, row: int) -> float:
        """Share of the attention that the budgets of a row follow; 0: they do not."""
        return self._masses[row]

    def longest(self, row: int, num_pages: int) -> list[int]:
        """Most pages that each head of a row of so many pages may read; the device may choose fewer."""
        budgets = self._of_rows[row]
        if self._masses[row]:
            budgets = map(self._sizes.longest, budgets)
        return [min(num_pages, budget) for budget in budgets]

    def start(self, rows: torch.Tensor, budget_pages: torch.Tensor, masses: torch.Tensor | None = None) -> None:
        """Requests start to decode, in the order of the forward passes.

        Parameters
        ----------
        rows : int64, ``[n]``, device
        budget_pages : int64, ``[n, num_kv_heads]``, device
        masses : float32, ``[n]``, device, optional
        """
        self.pages.index_copy_(0, rows, budget_pages)
        if masses is not None:
            self.masses.index_copy_(0, rows, masses)
