"""The radix cache backend `freekv`: SGLang's tree over slots of the host store, with counters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, default_radix_cache_factory

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import (
        BasePrefixCache,
        EvictParams,
        EvictResult,
    )


def create_radix_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """Build the tree; with ``--disable-radix-cache``, what SGLang builds then."""
    if ctx.disable_radix_cache:
        return default_radix_cache_factory(ctx)
    return FreeKVRadixCache(ctx.params)


class FreeKVRadixCache(RadixCache):
    """SGLang's radix tree. Its node values are slots of the host store, so a shared prefix is stored once there,
    and its page summaries, indexed by page, are shared with it.

    Eviction frees host pages. Blocks of an evicted page stay on the device until the page gets a new owner or the
    clock takes them; nobody can reach them before that.
    """

    evicted_tokens = 0  # since start-up

    def evict(self, params: EvictParams) -> EvictResult:
        result = super().evict(params)
        self.evicted_tokens += result.num_tokens_evicted
        return result

    def report(self) -> dict[str, int]:
        """Tokens of the host store that the tree holds."""
        return {
            "tree_tokens": self.evictable_size_ + self.protected_size_,
            "tree_protected_tokens": self.protected_size_,
            "tree_evicted_tokens": self.evicted_tokens,
        }
