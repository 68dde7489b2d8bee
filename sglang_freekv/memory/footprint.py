"""What the device holds of running requests: the engine's half of the KV footprint (`benchmarks/footprint.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.layers import LayerKind


class DeviceFootprint:
    """Device memory that decoding requests cannot do without, in tokens of the device's KV over all layers and heads.

    A request of n pages, with a budget of b pages for a KV head, has in that head

        min(n, 2 b)  pages of each layer whose windows are chosen: its front and its back window
        min(n, w)    pages of each layer with a sliding window, which lies in w pages
        n            pages of each dense layer

    and the page index of its n pages, as the tokens whose KV takes as many bytes. Windows are counted by this bound,
    which is what there are blocks for: the two share pages, but how many only the device knows. It holds over the heads
    of a request as well where their budgets follow the mass, as these have b on the mean. Blocks that no running
    request's window holds are not counted: they are a cache, and the next request may take them.

    Parameters
    ----------
    geometry : Geometry
    kinds : sequence of LayerKind
        Of each layer.
    index_page_bytes : int
        Device bytes of one page's index, all layers and heads.
    """

    def __init__(self, geometry: Geometry, kinds: Sequence[LayerKind], index_page_bytes: int) -> None:
        g = self._geometry = geometry
        self._num_windowed = sum(kind.selects for kind in kinds)
        self._sliding = [kind.num_sliding_pages(g.page_size) for kind in kinds if kind.sliding_window is not None]
        self._num_dense = len(kinds) - self._num_windowed - len(self._sliding)
        self._index_page_bytes = index_page_bytes
        self._token_bytes = g.num_layers * g.num_kv_heads * g.block_bytes // g.page_size

    def tokens(self, num_pages: Sequence[int], budgets: Sequence[Sequence[int]]) -> int:
        """Tokens held for a batch, rounded down; on the host, without asking the device.

        Parameters
        ----------
        num_pages : sequence of int
            Of each request.
        budgets : sequence of sequences of int, pages
            Of each request and KV head.
        """
        g, pages = self._geometry, sum(num_pages)
        windows = sum(min(n, 2 * budget) for n, own in zip(num_pages, budgets, strict=True) for budget in own)
        sliding = sum(min(n, width) for n in num_pages for width in self._sliding)
        blocks = windows * self._num_windowed + (sliding + pages * self._num_dense) * g.num_kv_heads
        return (blocks * g.block_bytes + pages * self._index_page_bytes) // self._token_bytes
