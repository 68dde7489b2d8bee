"""Windows: which pages each running request attends to, now and in the next step."""

from __future__ import annotations

from typing import NamedTuple

import torch

from freekv_kernels import GROUP_PAGES, list_width
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry

# Pages that a row may select for each that its budget has room for, where rows share. The needs of heads have a long
# tail, and what it costs is memory for lists of pages, 4 bytes a page.
_WIDEST_ROW = 4


class WindowSizes(NamedTuple):
    """The parts of a window, in pages."""

    sink: int
    recent: int
    budget: int  # what a request has that asks for nothing
    max_budget: int  # what a request may ask for
    times: int  # how many times the selected pages of its budget a row may select: more than 1 where rows share

    @classmethod
    def of(cls, config: FreeKVConfig, page_size: int) -> WindowSizes:
        tokens = (config.sink_tokens, config.recent_tokens, config.budget_tokens, config.max_budget_tokens)
        sink, recent, budget, most = (n // page_size for n in tokens)
        # A list of candidates always has as many for each page.
        times = min(_WIDEST_ROW, config.candidates or _WIDEST_ROW)
        return cls(sink, recent, budget, most, 1 if config.mass is None else times)

    def longest(self, budget: int) -> int:
        """Most pages of a row with that budget."""
        fixed = self.sink + self.recent
        return fixed + self.times * (budget - fixed)

    @property
    def width(self) -> int:
        """Of a window."""
        return self.longest(self.max_budget)

    def num_listed(self, candidates: int, max_pages: int) -> int | None:
        """Columns of a list of the pages that are scored one by one, with so many `candidates` for each page selected.

        None where every page is scored: without a first level, or as all of a request's pages would be listed.
        """
        width = list_width(candidates, self.max_budget - self.sink - self.recent, self.sink, self.recent)
        return width if candidates and width < max_pages else None

    def num_scored(self, candidates: int, max_pages: int) -> int:
        """Columns of the workspace of scores: of the list and of the groups scored before it, or of all pages."""
        num_listed = self.num_listed(candidates, max_pages)
        return max_pages if num_listed is None else max(num_listed, max_pages // GROUP_PAGES)


class Windows:
    """The double buffer of page lists, indexed by `req_pool_idx`; row 0 is padding. Of layers whose queries see all.

    Entries are *logical* pages (position // page_size): SGLang may give a running request other host pages when it
    de-duplicates a prefix. Step t reads the front, ``pages[t % 2]``, and writes the back, for the next.

    Attributes
    ----------
    pages : int32, ``[2, num_full_layers, max_requests + 1, num_kv_heads, width]``, device
        Ascending, -1 padded. A row within its budget changes its window only when a page is opened, in both halves.
    last_q : model dtype, ``[num_full_layers, max_requests + 1, num_kv_heads, group_size, head_dim]``, device
        Latest queries.
    pace : int32, ``[num_full_layers, max_requests + 1, num_kv_heads, 2]``, device
        Steps from one scoring of a row to the next, and steps that are left before it.
    """

    def __init__(self, geometry: Geometry, max_requests: int, width: int, device: str) -> None:
        g, rows = geometry, max_requests + 1
        num_layers = max(len(g.full_layers), 1)  # a kernel of no layers has no shape
        shape = (2, num_layers, rows, g.num_kv_heads, width)
        self.pages = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.last_q = torch.zeros(
            (num_layers, rows, g.num_kv_heads, g.group_size, g.head_dim), dtype=g.dtype, device=device
        )
        self.pace = torch.zeros((num_layers, rows, g.num_kv_heads, 2), dtype=torch.int32, device=device)

    def start(self, rows: torch.Tensor) -> None:
        """Requests start to decode in these rows (int64, ``[n]``, device): they are scored in their first step."""
        self.pace[:, rows, :, 0] = 1
        self.pace[:, rows, :, 1] = 0

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.last_q.nbytes + self.pace.nbytes
