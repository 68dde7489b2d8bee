"""Windows: which pages each running request attends to, now and in the next step."""

from __future__ import annotations

import torch

from sglang_freekv.geometry import Geometry


class Windows:
    """The double buffer of page lists, indexed by `req_pool_idx`; row 0 is padding.

    Entries are *logical* pages (position // page_size): SGLang may give a running request other host pages when it
    de-duplicates a prefix. The front is read by this step; the back is written by it, for the next.

    Attributes
    ----------
    pages : int32, ``[2, num_layers, max_requests + 1, num_kv_heads, max_budget_pages]``, device
        Ascending, -1 padded.
    last_q : model dtype, ``[num_layers, max_requests + 1, num_kv_heads, group_size, head_dim]``, device
        Queries of the previous step.
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
        self._front = 0

    def swap(self) -> None:
        """The back becomes the front."""
        self._front ^= 1

    def front(self, layer: int) -> torch.Tensor:
        return self.pages[self._front, layer]

    def back(self, layer: int) -> torch.Tensor:
        return self.pages[self._front ^ 1, layer]

    def start(self, layer: int, rows: torch.Tensor, window: torch.Tensor) -> None:
        """Set the first window ``[batch_size, num_kv_heads, max_budget_pages]`` of rows whose prompt is complete.

        Both buffers: a request within its budget changes its window only when it opens a page.
        """
        self.pages[:, layer, rows] = window

    def open_page(self, rows: torch.Tensor, pages: torch.Tensor) -> None:
        """Add the page that a request within its budget opens, in all layers."""
        self.pages[:, :, rows, :, pages] = pages[:, None, None, None].int()

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.last_q.nbytes
