"""Sizes of all pools, computed once at start-up and printed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from sglang_freekv.config import FreeKVConfig, UnsupportedConfiguration
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.layers import arena_tokens, num_windowed_layers
from sglang_freekv.memory.needs import Needs, blocks_of_request, bytes_by_page
from sglang_freekv.memory.recalls import RECALLS
from sglang_freekv.memory.units import GIB, in_words

# Of the device memory, where the user does not size the host store: the rest is for device blocks.
_SUMMARIES_SHARE = 0.5


@dataclass(frozen=True)
class MemoryPlan:
    """What fits. Bytes unless the name says otherwise."""

    geometry: Geometry
    config: FreeKVConfig
    num_pages: int  # of the host store, without the padding page
    num_blocks: int  # device blocks of each layer whose windows are chosen
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
        """Device blocks of the layers whose windows are chosen: what ``--freekv-device-blocks-memory`` sizes."""
        g = self.geometry
        return self.num_blocks * num_windowed_layers(self.config, g) * g.block_bytes

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
            "device blocks": (self.device_blocks_bytes, self._describe_blocks()),
            "page summaries": (self.summaries_bytes, "with key codes and block table"),
            "prefill arena": (self.arena_bytes, f"2 x {arena_tokens(c, self.geometry):,} tokens of one layer"),
            "windows": (self.windows_bytes, "page lists and latest queries"),
            **on_gpu,
        }
        lines = [f"  {name:<17}{in_words(size):>10}  {what}" for name, (size, what) in pools.items()]
        lines.append(
            f"  running requests {self.max_requests:>10,}  at most, each with up to {c.max_budget_tokens:,} tokens on "
            f"the device ({c.windows:g} windows: {in_words(self.request_bytes)})"
        )
        lines += [f"  --freekv-windows {offer}" for offer in self._offers()]
        if on_gpu:
            lines.append(
                f"  {resident:,} of the {self.num_tokens:,} tokens fit on the device, in all heads; as long as no more "
                f"are in use, nothing is recalled from CPU memory"
            )
        return "\n".join(["FreeKV memory plan", *lines])

    def _describe_blocks(self) -> str:
        """How many blocks of which layers."""
        windows = [window for window in self.geometry.sliding_windows if window is not None]
        sliding = f"; {len(windows)} layers have a sliding window of up to {max(windows):,} tokens" if windows else ""
        return f"{self.num_blocks:,} per layer{' that sees everything' if windows else ''}{sliding}"

    def _offers(self) -> list[str]:
        """What more windows for each request would buy; nothing where everything is resident."""
        g, c = self.geometry, self.config
        if self.num_blocks >= (self.num_pages + 1) * g.num_kv_heads:
            return []
        offers = []
        for windows, recalls in RECALLS.items():
            fitting = self.num_blocks // blocks_of_request(g, replace(c, windows=windows))
            if windows > c.windows and fitting:
                offers.append(
                    f"{windows} {min(fitting, self.max_requests):>9,} requests at most, "
                    f"which recall {recalls:.2f} times what they do with 2 windows"
                )
        return offers

    def report(self) -> dict[str, Any]:
        """The settings as resolved, by keyword, and the sizes of the plan, for `/server_info`: JSON only."""
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("geometry", "config")}
        resolved = {
            "freekv_host_memory": self.host_bytes / GIB,
            "freekv_device_blocks_memory": self.cached_blocks_bytes / GIB,
        }
        return {"config": self.config.keywords() | resolved, "memory_plan": sizes | {"num_tokens": self.num_tokens}}


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
        Upper bound on running requests from SGLang. Each needs a page of its own, so no more are planned for.
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
    num_pages = _plan_pages(geometry, config, device_bytes, host_bytes, max_total_tokens)
    needs = Needs(geometry, config, num_pages, max_context, attention_bytes)
    num_blocks, max_requests = _plan_blocks(needs, device_bytes - needs.fixed_bytes, min(max_requests, num_pages))
    return _plan_of(needs, num_blocks, max_requests)


def _plan_of(needs: Needs, num_blocks: int, max_requests: int) -> MemoryPlan:
    return MemoryPlan(
        geometry=needs.geometry,
        config=needs.config,
        num_pages=needs.num_pages,
        num_blocks=num_blocks,
        max_requests=max_requests,
        host_bytes=(needs.num_pages + 1) * needs.geometry.page_bytes,
        device_blocks_bytes=(
            num_blocks * needs.layer_blocks_bytes + needs.dense_bytes + needs.sliding_bytes(max_requests)
        ),
        summaries_bytes=needs.summaries_bytes,
        arena_bytes=needs.arena_bytes,
        windows_bytes=(max_requests + 1) * needs.window_bytes,
        workspace_bytes=needs.workspace_bytes(max_requests) + needs.attention_bytes,
        request_bytes=(
            needs.blocks_per_request * needs.layer_blocks_bytes + needs.sliding_bytes(1) + needs.window_bytes
        ),
    )


def _plan_pages(
    geometry: Geometry, config: FreeKVConfig, device_bytes: int, host_bytes: int, max_total_tokens: int | None
) -> int:
    """Pages of the host store, without the padding page."""
    if config.host_memory_gib is not None:
        host_bytes = int(config.host_memory_gib * GIB)
    else:
        with_summaries = max(int(device_bytes * _SUMMARIES_SHARE) // bytes_by_page(geometry, config), 2)
        host_bytes = min(host_bytes, with_summaries * geometry.page_bytes)
    num_pages = host_bytes // geometry.page_bytes - 1  # page 0 is padding
    if max_total_tokens is not None:
        num_pages = min(num_pages, max_total_tokens // geometry.page_size)
    if num_pages < 1:
        raise UnsupportedConfiguration(
            f"FreeKV: the host store of {in_words(host_bytes)} holds no page (one page of all layers takes "
            f"{in_words(geometry.page_bytes)}, and one more is padding); raise --freekv-host-memory"
        )
    return num_pages


def _plan_blocks(needs: Needs, left: int, max_requests: int) -> tuple[int, int]:
    """Device blocks of a layer, and running requests: each has its windows of them, or everything is resident."""
    asked = needs.asked_blocks_bytes()
    if needs.max_context is not None or needs.sliding_bytes(1):
        # SGLang proposes thousands; buffers of requests that could never run would take the blocks' memory.
        max_requests = min(max_requests, max(_requests_with_buffers(needs, left, asked), 1))
    blocks_bytes = left - max_requests * needs.row_bytes if asked is None else asked
    per_layer = needs.layer_blocks_bytes
    num_blocks = min(blocks_bytes // per_layer, needs.num_pairs) if per_layer else needs.num_pairs
    if num_blocks < needs.num_pairs:
        max_requests = min(max_requests, num_blocks // needs.blocks_per_request)
    if max_requests < 1 or blocks_bytes < 0:
        config, g = needs.config, needs.geometry
        share = bytes_by_page(g, config) / g.page_bytes
        raise UnsupportedConfiguration(
            f"FreeKV: {in_words(max(blocks_bytes, 0))} of device blocks cannot hold one request, whose "
            f"{config.windows:g} windows take {in_words(needs.blocks_per_request * per_layer)} at a budget of "
            f"{config.max_budget_tokens:,} tokens; raise --freekv-device-blocks-memory or --mem-fraction-static, or "
            f"lower --freekv-windows, --freekv-max-budget, --freekv-budget or --freekv-host-memory (page summaries "
            f"take {share:.1%} of it)"
        )
    return num_blocks, max_requests


def _requests_with_buffers(needs: Needs, left: int, asked: int | None) -> int:
    """Requests whose buffers fit beside the blocks: those asked for, or as many as the requests themselves need."""
    if asked is None:
        with_own_blocks = left // (needs.row_bytes + needs.blocks_per_request * needs.layer_blocks_bytes)
        with_all_resident = (left - needs.num_pairs * needs.layer_blocks_bytes) // needs.row_bytes
        return max(with_own_blocks, with_all_resident)
    if asked > left - needs.row_bytes:
        raise UnsupportedConfiguration(
            f"FreeKV: device blocks take {in_words(asked)}, but {in_words(max(left - needs.row_bytes, 0))} of "
            f"the device are left for them after page summaries ({in_words(needs.summaries_bytes)}), prefill arena "
            f"({in_words(needs.arena_bytes)}) and the buffers of a step; lower --freekv-device-blocks-memory, "
            f"--freekv-host-memory or --freekv-arena, or raise --mem-fraction-static"
        )
    return (left - asked) // needs.row_bytes
