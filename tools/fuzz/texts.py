"""What requests say, and the keys, values and queries that a model would compute for it.

The K and V of a token are a function of the tokens up to it and of the tenant, as in a real model. So two requests may
share a page exactly if they have the same prefix; and what one wrote differs from what any other text holds there.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from sglang_freekv.memory.geometry import Geometry

NUM_ROWS = 4093  # different keys and values
_MASK = (1 << 61) - 1
# A KV head's query stays for so many tokens and then turns away.
_QUERY_LASTS = (3, 5)


@lru_cache(maxsize=4096)
def prefix_hashes(before: int, ids: bytes) -> np.ndarray:
    """Hash of each token and all tokens before it, int64 ``[n]``; `before` is that of what precedes `ids`."""
    hashes = []
    for token in array("q", ids):
        before = ((before ^ token) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _MASK
        hashes.append(before)
    return np.array(hashes)


def hash_of_tenant(extra_key: str | None) -> int:
    """What precedes a tenant's first token."""
    return 1 if extra_key is None else 2 + ord(extra_key)


@dataclass(frozen=True)
class Text:
    """A prompt and what will be generated after it. `extra_key` is SGLang's name for the tenant."""

    ids: array
    extra_key: str | None

    @cached_property
    def hashes(self) -> np.ndarray:
        return prefix_hashes(hash_of_tenant(self.extra_key), self.ids.tobytes())


@lru_cache(maxsize=1024)
def make_text(num_tokens: int, story: int, twist: int, ending: int, extra_key: str | None) -> Text:
    """The text of a story, which from token `twist` on is one of its endings."""
    ids = [story * 1000 + i if i < twist else story * 1000 + i + ending * 100_000 for i in range(num_tokens)]
    return Text(array("q", ids), extra_key)


@lru_cache
def values_for(geometry: Geometry) -> Values:
    """The same for every engine of a geometry."""
    return Values(geometry)


class Values:
    """Keys, values and queries of every text: rows of random tables, chosen by the tokens' hashes."""

    def __init__(self, geometry: Geometry) -> None:
        g, rng = geometry, np.random.default_rng(0)
        layers_and_heads = (g.num_layers, g.num_kv_heads)
        # [row, num_layers, num_kv_heads, 2, head_dim]
        self.table = rng.standard_normal((NUM_ROWS, *layers_and_heads, 2, g.head_dim), dtype=np.float32)
        # [row, num_layers, num_kv_heads, group_size, head_dim]
        self._queries = rng.standard_normal((NUM_ROWS, *layers_and_heads, g.group_size, g.head_dim), dtype=np.float32)
        self._lasts = np.resize(_QUERY_LASTS, g.num_kv_heads)

    def kv(self, hashes: np.ndarray) -> np.ndarray:
        """K and V of tokens: ``[n, num_layers, num_kv_heads, 2, head_dim]``."""
        return self.table[hashes % NUM_ROWS]

    def kv_of_heads(self, hashes: np.ndarray, layer: int) -> np.ndarray:
        """K and V of one layer, of other tokens for each KV head: ``[num_kv_heads, n]`` -> ``[..., 2, head_dim]``."""
        return self.table[hashes % NUM_ROWS, layer, np.arange(len(hashes))[:, None]]

    def queries(self, text: Text, first: int, last: int) -> np.ndarray:
        """Queries of the tokens first to last - 1: ``[n, num_layers, num_kv_heads, group_size, head_dim]``."""
        position = np.arange(first, last)[:, None]
        rows = text.hashes[position // self._lasts * self._lasts] % NUM_ROWS  # [n, num_kv_heads]
        return self._queries[rows, :, np.arange(len(self._lasts))].swapaxes(1, 2)
