"""Windows: which pages each running request attends to, now and in the next step."""

from __future__ import annotations

import torch

from sglang_freekv.memory.geometry import Geometry


class Windows:
    """The double buffer of page lists, indexed by `req_pool_idx`; row 0 is padding.

    Entries are *logical* pages (position // page_size): SGLang may give a running request other host pages when it
    de-duplicates a prefix. Step t reads the front, ``pages[t % 2]``, and writes the back, for the next.

    Attributes
    ----------
    pages : int32, ``[2, num_layers, max_requests + 1, num_kv_heads, max_budget_pages]``, device
        Ascending, -1 padded. A request within its budget changes its window only when it opens a page, in both.
    last_q : model dtype, ``[num_layers, max_requests + 1, num_kv_heads, group_size, head_dim]``, device
        Latest queries.
    budget_pages : int64, ``[max_requests + 1]``, device
    """

    def __init__(self, geometry: Geometry, max_requests: int, max_budget_pages: int, device: str) -> None:
        g = geometry
        rows = max_requests + 1
        shape = (2, g.num_layers, rows, g.num_kv_heads, max_budget_pages)
        self.pages = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.last_q = torch.zeros(
            (g.num_layers, rows, g.num_kv_heads, g.group_size, g.head_dim), dtype=g.dtype, device=device
        )
        self.budget_pages = torch.full((rows,), max_budget_pages, dtype=torch.int64, device=device)
        self._budget_pages = [max_budget_pages] * rows  # the host's copy

    def admit(self, row: int, budget_pages: int) -> None:
        """A request takes a row of the request table. The device hears of its budget when it starts to decode: the last
        step of the row's last owner may not have run yet."""
        self._budget_pages[row] = budget_pages

    def start(self, rows: torch.Tensor, budget_pages: torch.Tensor) -> None:
        """Requests start to decode, in the order of the forward passes; both int64 ``[n]``, device."""
        self.budget_pages.index_copy_(0, rows, budget_pages)

    def budget_of(self, row: int) -> int:
        """Budget in pages, without asking the device."""
        return self._budget_pages[row]

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.last_q.nbytes
