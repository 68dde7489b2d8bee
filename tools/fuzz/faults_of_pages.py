"""Faults of host pages: who owns them, and what they hold."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from pytest import MonkeyPatch
from sglang.srt.mem_cache.base_prefix_cache import InsertResult
from sglang.srt.mem_cache.radix_cache import RadixKey

from freekv_kernels.fp8 import decode_fp8, encode_bounds
from sglang_freekv.cpu.allocator import CpuPagedAllocator
from sglang_freekv.memory.host_store import HostStore
from sglang_freekv.serving.kv_pool import FreeKVReqToTokenPool
from sglang_freekv.serving.radix_cache import FreeKVRadixCache
from tools.fuzz.planting import fault, faults_in, wrap, wrap_op
from tools.fuzz.setups import PAGE_SIZE

# Host pages: the allocator, the request table and the tree


@fault("have leaked")
def a_release_forgets_a_page(patch: MonkeyPatch) -> None:
    def release(original, self, *pages):
        original(self, *pages[:-1], pages[-1][:-1])

    wrap(patch, CpuPagedAllocator, "_release_page_ids", release)


@fault("owned twice")
def a_release_frees_a_page_twice(patch: MonkeyPatch) -> None:
    wrap(patch, CpuPagedAllocator, "_release_page_ids", lambda original, self, *p: original(self, *p, p[0][:1]))


@fault("have leaked")
def eviction_drops_nodes_and_keeps_their_pages(patch: MonkeyPatch) -> None:
    def evict(original, self, params):
        with MonkeyPatch.context() as meanwhile:
            meanwhile.setattr(CpuPagedAllocator, "free_segment", lambda *args, **kwargs: None)
            return original(self, params)

    wrap(patch, FreeKVRadixCache, "evict", evict)


@fault("locks on a node")
def a_running_request_does_not_lock_its_prefix(patch: MonkeyPatch) -> None:
    patch.setattr(FreeKVRadixCache, "inc_lock_ref", lambda self, node: None)


@fault("locks on a node")
def a_finished_request_keeps_its_locks(patch: MonkeyPatch) -> None:
    patch.setattr(FreeKVRadixCache, "dec_lock_ref", lambda self, node: None)


def shorten_prefix_hits(patch: MonkeyPatch, limit_of: Callable[[int], int]) -> None:
    """Requests find less of their prompts in the tree than it has."""

    def match(original, self, params):
        if params.key.limit is not None:  # not where SGLang looks for what it has just stored
            params.key.limit = max(0, limit_of(params.key.limit))
        return original(self, params)

    wrap(patch, FreeKVRadixCache, "match_prefix", match)


@fault("tree: found")
def a_prefix_hit_is_a_page_short(patch: MonkeyPatch) -> None:
    shorten_prefix_hits(patch, lambda limit: limit - PAGE_SIZE)


def prefill_everything(patch: MonkeyPatch) -> None:
    """No prefix is found, and that is not checked: so there are many duplicates."""
    shorten_prefix_hits(patch, lambda limit: 0)
    patch.setattr("tools.fuzz.scheduler.longest_prefix", lambda *args: 0)


@fault("have leaked")
def a_duplicate_of_a_prefix_is_not_freed(patch: MonkeyPatch) -> None:
    def insert(original, self, params):
        return InsertResult(prefix_len=0, last_device_node=original(self, params).last_device_node)

    prefill_everything(patch)
    wrap(patch, FreeKVRadixCache, "insert", insert)


@fault("stored twice")
def a_prefix_is_stored_twice(patch: MonkeyPatch) -> None:
    def insert(original, self, params):
        children = self.root_node.children
        hidden = {key: children.pop(key) for key, node in list(children.items()) if node.lock_ref == 0}
        result = original(self, params)
        for key, node in hidden.items():
            children[object() if key in children else key] = node
        return result

    prefill_everything(patch)
    wrap(patch, FreeKVRadixCache, "insert", insert)


@fault("tree: found|other tokens")
def tenants_share_a_prefix(patch: MonkeyPatch) -> None:
    patch.setattr(RadixKey, "_check_compatible", lambda self, other: None)
    patch.setattr(RadixKey, "child_key", lambda self, page_size=1: tuple(self.token_ids[:page_size]))


@fault("not full is shared")
def a_partial_page_is_shared(patch: MonkeyPatch) -> None:
    def cache_finished(original, self, req, *args, **kwargs):
        with MonkeyPatch.context() as meanwhile:
            meanwhile.setattr(RadixKey, "page_aligned", lambda self, page_size: self)
            original(self, req, *args, **kwargs)

    wrap(patch, FreeKVRadixCache, "cache_finished_req", cache_finished)


@fault("have leaked")
def a_retracted_request_keeps_its_pages(patch: MonkeyPatch) -> None:
    def cache_finished(original, self, req, is_insert=True, *, kv_len_to_handle):
        if is_insert:
            original(self, req, is_insert, kv_len_to_handle=kv_len_to_handle)
        else:
            self.dec_lock_ref(req.last_node)

    wrap(patch, FreeKVRadixCache, "cache_finished_req", cache_finished)


@fault("a row is lost")
def a_row_of_the_request_table_is_lost(patch: MonkeyPatch) -> None:
    patch.setattr(FreeKVReqToTokenPool, "free", lambda self, req: setattr(req, "req_pool_idx", None))


@fault("have leaked")
def a_flush_forgets_pages(patch: MonkeyPatch) -> None:
    def clear(original, self):
        original(self)
        self.free_pages = self.free_pages[: getattr(self, "num_cleared", None)]
        self.num_cleared = -1  # the first time is the constructor's

    wrap(patch, CpuPagedAllocator, "clear", clear)


@fault("padding page")
def the_padding_page_is_handed_out(patch: MonkeyPatch) -> None:
    def clear(original, self):
        original(self)
        self.free_pages -= 1

    wrap(patch, CpuPagedAllocator, "clear", clear)


# Content of host pages, summaries and codes


@fault("wrong summary")
def a_reused_page_keeps_its_summary(patch: MonkeyPatch) -> None:
    def summarize(original, summary, k, slots, page_size):
        pages = (slots // page_size).unique()
        old = decode_fp8(summary[pages])
        original(summary, k, slots, page_size)
        low, high = decode_fp8(summary[pages]).unbind(2)
        summary[pages] = encode_bounds(low, torch.maximum(high, old[:, :, 1]))

    wrap(patch, sys.modules["freekv_kernels.store_pages"], "summarize_pages", summarize)


@fault("wrong summary", setup="everything resident, two levels")
def a_page_that_ends_a_group_keeps_its_own_bounds(patch: MonkeyPatch) -> None:
    def encode(original, slots, store, codes, groups=None):
        original(slots, store, codes)

    wrap_op(patch, "encode_pages", encode)
    wrap(patch, sys.modules["freekv_kernels.append_tokens"], "encode_pages", encode)


@fault("wrong codes")
def a_page_that_decode_fills_keeps_its_codes(patch: MonkeyPatch) -> None:
    wrap(patch, sys.modules["freekv_kernels.append_tokens"], "encode_pages", lambda original, *args: None)


@fault("filled")
def a_reused_page_counts_its_last_owner_s_tokens(patch: MonkeyPatch) -> None:
    def mark_filled(self, slots):
        self.filled.scatter_reduce_(
            0, slots // self.geometry.page_size, slots.int() % self.geometry.page_size + 1, "amax"
        )

    patch.setattr(HostStore, "mark_filled", mark_filled)


@fault("is not what was written|wrong output|wrong summary|wrong codes")
def a_chunk_is_written_to_another_page_as_well(patch: MonkeyPatch) -> None:
    def store(original, k, v, slots, page_starts, store):
        original(k, v, slots, page_starts, store)
        others = store.host_kv[1:]
        others[slots[-1] // PAGE_SIZE % len(others), 0, 0, 0] = k[-1, 0]

    wrap_op(patch, "store_pages", store)


FAULTS = faults_in(globals())
