"""Sizes of all pools, computed once at start-up and printed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sglang_freekv.config import FreeKVConfig, UnsupportedConfiguration
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.layers import kinds_of
from sglang_freekv.memory.page_indexes import INDEXES
from sglang_freekv.memory.units import in_words

GIB = 1 << 30
# Of the device memory, where the user does not size the host store: the rest is for device blocks.
_SUMMARIES_SHARE = 0.5


@dataclass(frozen=True)
class MemoryPlan:
    """What fits. Bytes unless the name says otherwise."""

    geometry: Geometry
    config: FreeKVConfig
    num_pages: int  # of the host store, without the padding page
    num_blocks: int  # device blocks per layer
    max_requests: int  # running at the same time
    host_bytes: int
    device_blocks_bytes: int
    summaries_bytes: int  # page summaries, key codes and block table
    arena_bytes: int
    windows_bytes: int
    workspace_bytes: int  # buffers of a step on a GPU; on a CPU they are small, and not counted
    request_bytes: int  # device bytes that one running request may claim

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.geometry.page_size

    @property
    def max_input_tokens(self) -> int:
        """Longest prompt that SGLang ever schedules: it rounds up to pages, reserves one, and decodes a token."""
        return self.num_tokens - 2 * self.geometry.page_size

    @property
    def cached_blocks_bytes(self) -> int:
        """Device blocks of the layers that have windows: what ``--freekv-device-blocks-memory`` sizes."""
        g = self.geometry
        return self.num_blocks * sum(kind.is_cached for kind in kinds_of(self.config, g.num_layers)) * g.block_bytes

    def describe(self) -> str:
        """One line per pool, for the log."""
        c = self.config
        on_gpu = {}
        if self.workspace_bytes:
            resident = min(self.num_blocks // self.geometry.num_kv_heads * self.geometry.page_size, self.num_tokens)
            on_gpu = {"step workspace": (self.workspace_bytes, "page table, scores, lists, FlashInfer")}
        pools = {
            "host store": (
                self.host_bytes,
                f"{self.num_tokens:,} tokens of {in_words(self.geometry.token_bytes)}, all layers: what all requests "
                f"and the prefix cache may hold together",
            ),
            "device blocks": (self.device_blocks_bytes, f"{self.num_blocks:,} per layer"),
            "page summaries": (self.summaries_bytes, "with key codes and block table"),
            "prefill arena": (self.arena_bytes, f"2 x {c.arena_tokens:,} tokens of one layer"),
            "windows": (self.windows_bytes, "page lists and latest queries"),
            **on_gpu,
        }
        lines = [f"  {name:<17}{in_words(size):>10}  {what}" for name, (size, what) in pools.items()]
        lines.append(
            f"  running requests {self.max_requests:>10,}  at most, each with up to {c.max_budget_tokens:,} tokens on "
            f"the device (front and back window: {in_words(self.request_bytes)})"
        )
        if on_gpu:
            lines.append(
                f"  {resident:,} of the {self.num_tokens:,} tokens fit on the device, in all heads; as long as no more "
                f"are in use, nothing is recalled from CPU memory"
            )
        return "\n".join(["FreeKV memory plan", *lines])

    def report(self) -> dict[str, Any]:
        """The settings as resolved, by keyword, and the sizes of the plan, for `/server_info`: JSON only."""
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("geometry", "config")}
        resolved = {
            "freekv_host_memory": self.host_bytes / GIB,
            "freekv_device_blocks_memory": self.cached_blocks_bytes / GIB,
        }
        return {"config": self.config.keywords() | resolved, "memory_plan": sizes | {"num_tokens": self.num_tokens}}


def workspace_bytes(geometry: Geometry, config: FreeKVConfig, max_context: int, max_requests: int) -> int:
    """Device bytes of the tables and lists of a decode step, at fixed addresses for CUDA graphs.

    Not counted: graphs, activations and what prefill allocates; SGLang keeps ``1 - mem_fraction_static`` free for them.

    Parameters
    ----------
    max_context : int
        Most tokens of a request; bounds its page table.
    max_requests : int
        Rows of the largest batch.
    """
    g, width = geometry, config.max_budget_pages
    max_pages = -(-max_context // g.page_size)
    batch = 8 * (max_pages + 4 + g.num_kv_heads)  # page table, row, slot, lengths, budgets
    scores = 2 * 4 * g.num_qo_heads * max_pages  # of the main and of the side stream
    misses = 2 * (8 + 4 + 4) * g.num_kv_heads * width  # front and back: pair, entry, block
    flags, opened = (4 + 1) * g.num_kv_heads, 8 * g.num_kv_heads
    window_attention = 4 * g.num_kv_heads * (width + 2)  # kv_indices, kv_indptr, last_page_len
    dense_attention = (
        4 * g.num_kv_heads * (max_pages + 2)
        if not all(kind.is_cached for kind in kinds_of(config, g.num_layers))
        else 0
    )
    return max_requests * (batch + scores + misses + flags + opened + window_attention + dense_attention)


def plan_memory(
    geometry: Geometry,
    config: FreeKVConfig,
    *,
    device_bytes: int,
    host_bytes: int,
    max_requests: int,
    max_total_tokens: int | None = None,
    max_context: int | None = None,
    attention_bytes: int = 0,
) -> MemoryPlan:
    """Divide the memory of one rank.

    Parameters
    ----------
    device_bytes : int
        Free for KV on the device, after weights and SGLang's own reserve.
    host_bytes : int
        For the host store of this rank, unless `config.host_memory_gib` says otherwise; less is taken where the
        summaries of so many pages would leave too little of the device.
    max_requests : int
        Upper bound on running requests from SGLang.
    max_total_tokens : int, optional
        Upper bound on the host store's tokens (``--max-total-tokens``).
    max_context : int, optional
        On a GPU: most tokens of a request. Plans for the buffers of a step, too; see `workspace_bytes`.
    attention_bytes : int
        Workspaces of the attention library.

    Raises
    ------
    UnsupportedConfiguration
        If a pool cannot hold what one request needs; the message says which flag to change.
    """
    g, num_heads = geometry, geometry.num_kv_heads
    page_summary_bytes = (
        INDEXES[config.selector_name].page_bytes(g) + 4 * g.num_layers * num_heads
    )  # and entries of the block table
    if config.host_memory_gib is not None:
        host_bytes = int(config.host_memory_gib * GIB)
    else:
        with_summaries = max(int(device_bytes * _SUMMARIES_SHARE) // page_summary_bytes, 2)
        host_bytes = min(host_bytes, with_summaries * g.page_bytes)
    num_pages = host_bytes // g.page_bytes - 1  # page 0 is padding
    if max_total_tokens is not None:
        num_pages = min(num_pages, max_total_tokens // g.page_size)
    if num_pages < 1:
        raise UnsupportedConfiguration(
            f"FreeKV: the host store of {in_words(host_bytes)} holds no page (one page of all layers takes "
            f"{in_words(g.page_bytes)}, and one more is padding); raise --freekv-host-memory"
        )

    num_dense = sum(not kind.is_cached for kind in kinds_of(config, g.num_layers))
    dense_bytes = (num_pages + 1) * num_dense * num_heads * g.block_bytes
    summaries_bytes = (num_pages + 1) * page_summary_bytes
    arena_bytes = 2 * config.arena_tokens * 2 * num_heads * g.head_dim * g.dtype.itemsize
    last_q_bytes = g.num_layers * g.num_qo_heads * g.head_dim * g.dtype.itemsize
    window_bytes = 2 * g.num_layers * num_heads * config.max_budget_pages * 4 + last_q_bytes  # of one request
    layer_blocks_bytes = (g.num_layers - num_dense) * g.block_bytes  # one block in each layer that has a window
    blocks_per_request = 2 * config.max_budget_pages * num_heads
    num_pairs = (num_pages + 1) * num_heads  # with this many blocks everything stays resident

    def workspace(num_requests: int) -> int:
        return 0 if max_context is None else workspace_bytes(g, config, max_context, num_requests)

    left = device_bytes - dense_bytes - summaries_bytes - arena_bytes - attention_bytes - window_bytes
    per_request = window_bytes + workspace(1)
    blocks_bytes = None
    if config.device_blocks_memory_gib is not None:  # more than everything would not be used
        blocks_bytes = min(int(config.device_blocks_memory_gib * GIB), num_pairs * layer_blocks_bytes)
    if max_context is not None:
        if blocks_bytes is not None and blocks_bytes > left - per_request:
            raise UnsupportedConfiguration(
                f"FreeKV: device blocks take {in_words(blocks_bytes)}, but {in_words(max(left - per_request, 0))} of "
                f"the device are left for them after page summaries ({in_words(summaries_bytes)}), prefill arena "
                f"({in_words(arena_bytes)}) and the buffers of a step; lower --freekv-device-blocks-memory, "
                f"--freekv-host-memory or --freekv-arena, or raise --mem-fraction-static"
            )
        # SGLang proposes thousands; buffers of requests that could never run would take the blocks' memory.
        if blocks_bytes is not None:
            fitting = (left - blocks_bytes) // per_request
        else:
            with_own_blocks = left // (per_request + blocks_per_request * layer_blocks_bytes)
            with_all_resident = (left - num_pairs * layer_blocks_bytes) // per_request
            fitting = max(with_own_blocks, with_all_resident)
        max_requests = min(max_requests, max(fitting, 1))
    if blocks_bytes is None:
        blocks_bytes = left - max_requests * per_request
    num_blocks = min(blocks_bytes // layer_blocks_bytes, num_pairs) if layer_blocks_bytes else num_pairs
    if num_blocks < num_pairs:
        max_requests = min(max_requests, num_blocks // blocks_per_request)
    if max_requests < 1:
        raise UnsupportedConfiguration(
            f"FreeKV: {in_words(max(blocks_bytes, 0))} of device blocks cannot hold one request, whose front and "
            f"back window take {in_words(blocks_per_request * layer_blocks_bytes)} at a budget of "
            f"{config.max_budget_tokens:,} tokens; raise --freekv-device-blocks-memory or --mem-fraction-static, or "
            f"lower --freekv-max-budget, --freekv-budget or --freekv-host-memory (page summaries take "
            f"{page_summary_bytes / g.page_bytes:.1%} of it)"
        )
    return MemoryPlan(
        geometry=g,
        config=config,
        num_pages=num_pages,
        num_blocks=num_blocks,
        max_requests=max_requests,
        host_bytes=(num_pages + 1) * g.page_bytes,
        device_blocks_bytes=num_blocks * layer_blocks_bytes + dense_bytes,
        summaries_bytes=summaries_bytes,
        arena_bytes=arena_bytes,
        windows_bytes=(max_requests + 1) * window_bytes,
        workspace_bytes=workspace(max_requests) + attention_bytes,
        request_bytes=blocks_per_request * layer_blocks_bytes + window_bytes,
    )
