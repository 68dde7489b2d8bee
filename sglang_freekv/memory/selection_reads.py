"""What choosing pages reads on the device, in bytes: counted by the engine, and predicted by the cost model."""

from __future__ import annotations

from collections.abc import Sequence

from freekv_kernels import GROUP_PAGES
from freekv_kernels.list_candidates import groups_of
from sglang_freekv.config import BASELINES, FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.page_indexes import index_of
from sglang_freekv.memory.windows import WindowSizes


class SelectionReads:
    """Bytes of the page index that one pass over a request's pages reads, all layers that select and all heads.

    Without a list of candidates that is the index of every page. With one it is the bounds of the groups between the
    sink and the recent pages, and the index of the pages that are listed; of requests whose pages all fit the list,
    that of every page. A decode step makes one pass for each request over its budget, where rows are scored at
    intervals for those that are due; on a GPU, correction by the cosine makes a second one over the flagged rows, which
    is not in it, nor is the pass that chooses a first window. Baselines that read no index have none.

    Parameters
    ----------
    num_layers : int
        That select.
    max_pages : int
        Of a request, as the memory has tables for.

    Attributes
    ----------
    page_bytes_of_row : int
        Of one page, in one layer and KV head, where every page is scored.
    """

    def __init__(self, geometry: Geometry, config: FreeKVConfig, num_layers: int, max_pages: int) -> None:
        self._sizes, self._candidates = WindowSizes.of(config, geometry.page_size), config.candidates
        self._num_listed = self._sizes.num_listed(self._candidates, max_pages)
        share = num_layers / max(len(geometry.full_layers), 1)
        is_read = config.selector_name not in BASELINES or config.selector_name == "arkvale"
        self._page_bytes = is_read * int(share * index_of(config).page_bytes(geometry))
        self.page_bytes_of_row = self._page_bytes // max(num_layers * geometry.num_kv_heads, 1)
        self._bounds_bytes = num_layers * geometry.num_kv_heads * 2 * geometry.head_dim

    def bytes(self, num_pages: Sequence[int], budgets: Sequence[Sequence[int]]) -> int:
        """Of a step.

        Parameters
        ----------
        num_pages : sequence of int
            Of each request.
        budgets : sequence of sequences of int, pages
            Of each request and KV head.
        """
        heads = ((n, budget, len(own)) for n, own in zip(num_pages, budgets, strict=True) for budget in own)
        return sum(self._of_head(n, budget) // num_heads for n, budget, num_heads in heads if n > budget)

    def _of_head(self, num_pages: int, budget: int) -> int:
        """Of one pass over a request, if all of its heads had this budget."""
        sizes, most = self._sizes, self._num_listed
        if most is None or num_pages <= most:
            return num_pages * self._page_bytes
        num_groups = (num_pages - sizes.recent) // GROUP_PAGES - groups_of(sizes.sink)
        always = num_pages - GROUP_PAGES * num_groups
        wanted = GROUP_PAGES * groups_of(self._candidates * (budget - sizes.sink - sizes.recent))
        return num_groups * self._bounds_bytes + min(most, always + wanted) * self._page_bytes
