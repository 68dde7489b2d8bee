"""The radix cache backend `freekv`: SGLang's tree over slots of the host store, with counters and an end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.radix_cache import RadixCache
from torch.distributed import get_rank

from sglang_freekv.serving.request_log import RequestLog

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import (
        BasePrefixCache,
        EvictParams,
        EvictResult,
    )
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext


def create_radix_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """Build the tree; with ``--disable-radix-cache``, the cache that forgets, as SGLang does."""
    if ctx.disable_radix_cache and ctx.effective_chunked_prefill_size is not None:
        return FreeKVChunkCache(ctx.params)
    return FreeKVRadixCache(ctx.params)


class _OfHostStore:
    """What either cache does for the host store."""

    evicted_tokens = 0  # since start-up

    def __init__(self, params: CacheInitParams) -> None:
        super().__init__(params)
        group = params.tp_cache_group
        self._logs = group is None or get_rank(group) == 0  # one rank for all
        self._request_log = RequestLog(params.token_to_kv_pool_allocator.get_kvcache().memory)

    def cache_finished_req(self, req: Req, is_insert: bool = True, *, kv_len_to_handle: int) -> None:
        """A request leaves its row, at its end or because it is retracted."""
        if self._logs and req.finished():
            self._request_log.end(req, self.req_to_token_pool.req_to_token[req.req_pool_idx, :kv_len_to_handle])
        super().cache_finished_req(req, is_insert, kv_len_to_handle=kv_len_to_handle)

    def report(self) -> dict[str, int]:
        """Tokens of the host store that the cache holds, for `/server_info`."""
        protected = self.protected_size()
        return {
            "tree_tokens": self.evictable_size() + protected,
            "tree_protected_tokens": protected,
            "tree_evicted_tokens": self.evicted_tokens,
        }

    def release_host_resources(self) -> None:
        """Unpin the host store: the kernel would take long over it when the process dies.

        A scheduler that ends as asked calls this on its cache, so that a patch is not needed.
        """
        self.token_to_kv_pool_allocator.get_kvcache().memory.unpin()


class FreeKVChunkCache(_OfHostStore, ChunkCache):
    """SGLang's cache of running requests only: it holds nothing."""


class FreeKVRadixCache(_OfHostStore, RadixCache):
    """SGLang's radix tree. Its node values are slots of the host store, so a shared prefix is stored once there,
    and its page summaries, indexed by page, are shared with it.

    Eviction frees host pages. Blocks of an evicted page stay on the device until the page gets a new owner or the
    clock takes them; nobody can reach them before that.
    """

    def evict(self, params: EvictParams) -> EvictResult:
        result = super().evict(params)
        self.evicted_tokens += result.num_tokens_evicted
        return result
