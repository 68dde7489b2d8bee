"""SGLang 0.5.23."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator as CpuAllocator  # noqa: F401
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

# Values that its parser does not take at all.
UNKNOWN_VALUES = frozenset({"--cuda-graph-backend-decode tc_piecewise"})
# Page sizes for which plain SGLang takes that allocator on the CPU platform.
PAGE_SIZES = (16, 32)
# What a server needs so that the scripted runtime can look into its tree: into the one in Rust it cannot from a wheel.
INSPECTABLE_TREE = {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}


def request(row: int, **fields: Any) -> SimpleNamespace:
    """As much of a request as has a row of the request table."""
    return SimpleNamespace(kv=SimpleNamespace(req_pool_idx=row), **fields)


def give_row(req: Any, row: int | None) -> None:
    """A request comes with a row and a page of tokens, or has none yet."""
    req.kv = ReqKvInfo(req_pool_idx=row, kv_allocated_len=32)


def let_go(cache: UnifiedRadixCache, req: SimpleNamespace, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request leaves its row with so many tokens, and the tree below ours does nothing."""
    monkeypatch.setattr(UnifiedRadixCache, "claim_kv_row", lambda *_: False)
    req.owned_kv_len = lambda: num_tokens
    assert cache.claim_kv_row(req) is False


def skip_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree below ours is not built."""
    monkeypatch.setattr(UnifiedRadixCache, "__init__", lambda self, params: None)
