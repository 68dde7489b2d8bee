"""SGLang 0.5.23: one tree for every model, with its core in Rust or in Python; switched off it forgets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_freekv.serving.radix_cache.host_store import OfHostStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, EvictParams, EvictResult
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext


def create_radix_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """Build the tree as SGLang does, but of our class."""
    return create_unified_radix_cache(ctx, cache_class=FreeKVRadixCache)


class FreeKVRadixCache(OfHostStore, UnifiedRadixCache):
    """SGLang's radix tree."""

    def claim_kv_row(self, req: Req) -> bool:
        """Whether a streaming session keeps the row; otherwise the request leaves it, and still has all its slots."""
        is_kept = super().claim_kv_row(req)
        if not is_kept:
            self.note_end(req, req.owned_kv_len())
        return is_kept

    def evict(self, params: EvictParams) -> EvictResult:
        return self._counted(super().evict(params))

    def evict_for_alloc(
        self, params: EvictParams, *, allocation_reclaim_satisfied: Callable[[], bool] | None = None
    ) -> EvictResult:
        return self._counted(super().evict_for_alloc(params, allocation_reclaim_satisfied=allocation_reclaim_satisfied))

    def _counted(self, result: EvictResult) -> EvictResult:
        self.evicted_tokens += result.num_tokens_evicted
        return result
