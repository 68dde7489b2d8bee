"""SGLang 0.5.17: a radix tree, and beside it a cache for servers without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.radix_cache import RadixCache

from sglang_freekv.serving.radix_cache.host_store import OfHostStore

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, EvictParams, EvictResult
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext


def create_radix_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """Build the tree; with ``--disable-radix-cache``, the cache that forgets, as SGLang does."""
    if ctx.disable_radix_cache and ctx.effective_chunked_prefill_size is not None:
        return FreeKVChunkCache(ctx.params)
    return FreeKVRadixCache(ctx.params)


class _WithEnds(OfHostStore):
    def cache_finished_req(self, req: Req, is_insert: bool = True, *, kv_len_to_handle: int) -> None:
        self.note_end(req, kv_len_to_handle)
        super().cache_finished_req(req, is_insert, kv_len_to_handle=kv_len_to_handle)


class FreeKVChunkCache(_WithEnds, ChunkCache):
    """SGLang's cache of running requests only: it holds nothing."""


class FreeKVRadixCache(_WithEnds, RadixCache):
    """SGLang's radix tree."""

    def evict(self, params: EvictParams) -> EvictResult:
        result = super().evict(params)
        self.evicted_tokens += result.num_tokens_evicted
        return result
