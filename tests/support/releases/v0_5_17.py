"""SGLang 0.5.17."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.radix_cache import RadixCache

from sglang_freekv.cpu.allocator import CpuPagedAllocator as CpuAllocator  # noqa: F401

# Values that its parser does not take at all.
UNKNOWN_VALUES: frozenset[str] = frozenset()
# Page sizes for which plain SGLang takes that allocator on the CPU platform.
PAGE_SIZES = (1, 16, 32)
# What a server needs so that the scripted runtime can look into its tree.
INSPECTABLE_TREE: dict[str, str] = {}


def request(row: int, **fields: Any) -> SimpleNamespace:
    """As much of a request as has a row of the request table."""
    return SimpleNamespace(req_pool_idx=row, **fields)


def give_row(req: Any, row: int | None) -> None:
    """A request comes with a row and a page of tokens, or has none yet."""
    req.req_pool_idx = row
    req.inflight_middle_chunks, req.kv_committed_len = 0, 0 if row is None else 32


def let_go(cache: RadixCache, req: SimpleNamespace, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request leaves its row with so many tokens, and the tree below ours does nothing."""
    monkeypatch.setattr(RadixCache, "cache_finished_req", lambda *_, **__: None)
    cache.cache_finished_req(req, kv_len_to_handle=num_tokens)


def skip_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree below ours is not built."""
    monkeypatch.setattr(RadixCache, "__init__", lambda self, params: None)
