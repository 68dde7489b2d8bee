"""SGLang 0.5.17 asks a platform for its KV pool, and for an allocator that does without Triton."""

from __future__ import annotations


class Pools:
    """The part of a platform on which SGLang builds its memory."""

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from sglang_freekv.cpu.allocator import CpuPagedAllocator

        return CpuPagedAllocator
