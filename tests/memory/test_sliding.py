"""What layers with a sliding window take: their windows on the device, and no index, in plan, memory and footprint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sglang_freekv.attention.prefix_pieces import cut_tails
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.footprint import DeviceFootprint
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import kinds_of
from sglang_freekv.memory.plan import MemoryPlan, plan_memory
from sglang_freekv.memory.units import GIB

PAGE = 32
# As Gemma 3 with 12 billion parameters: one layer of six sees everything.
WINDOWS = (1024, 1024, 1024, 1024, 1024, None) * 8
GEMMA = Geometry(48, 16, 8, 256, torch.bfloat16, key_bits=2, sliding_windows=WINDOWS)
# The window lies in 33 pages, and a page is opened before another may go.
BLOCKS_OF_REQUEST = 34 * 8


def plan(
    geometry: Geometry = GEMMA, device_gib: float = 30, config: FreeKVConfig | None = None, **changes: object
) -> MemoryPlan:
    arguments = {"max_requests": 4096, "max_context": 131072, "attention_bytes": 140 << 20, **changes}
    sizes = {"device_bytes": int(device_gib * GIB), "host_bytes": 200 * GIB}
    return plan_memory(geometry, config or FreeKVConfig(), **sizes, **arguments)


@pytest.mark.parametrize("device_gib", [8, 30, 110])
@pytest.mark.parametrize("max_context", [131072, None])
def test_everything_fits_and_every_request_has_both_kinds_of_windows(
    device_gib: float, max_context: int | None
) -> None:
    found = plan(device_gib=device_gib, max_context=max_context)
    parts = ("device_blocks_bytes", "summaries_bytes", "arena_bytes", "windows_bytes", "workspace_bytes")
    assert sum(getattr(found, part) for part in parts) <= device_gib * GIB
    num_pairs = (found.num_pages + 1) * 8
    sliding = 40 * min(found.max_requests * BLOCKS_OF_REQUEST, num_pairs) * GEMMA.block_bytes
    assert found.device_blocks_bytes == 8 * found.num_blocks * GEMMA.block_bytes + sliding
    assert found.num_blocks == num_pairs or found.num_blocks >= found.max_requests * 2 * 64 * 8


def test_more_requests_fit_and_pages_cost_less_than_where_every_layer_sees_all() -> None:
    ours, full = plan(), plan(replace(GEMMA, sliding_windows=()))
    assert ours.max_requests > full.max_requests
    # The index is kept of 8 layers of 48, and the block table of all.
    table = 4 * 48 * 8 * (full.num_pages + 1)
    index = (full.summaries_bytes - table) // (full.num_pages + 1)
    assert ours.summaries_bytes == (ours.num_pages + 1) * (index // 6 + 4 * 48 * 8)


def test_the_memory_has_what_is_planned() -> None:
    geometry = Geometry(3, 4, 2, 16, torch.float32, key_bits=2, sliding_windows=(100, None, 40))
    config = FreeKVConfig(arena_tokens=2 * PAGE, budget_tokens=512)
    found = plan(geometry, 0.004, config, max_context=None, max_requests=3, attention_bytes=0)
    memory = KVMemory(
        geometry,
        config,
        num_host_pages=found.num_pages + 1,
        num_blocks=found.num_blocks,
        max_requests=found.max_requests,
        max_context=found.num_tokens,
    )
    assert found.device_blocks_bytes == memory.blocks.nbytes
    assert memory.blocks.num_blocks == [3 * 6 * 2, found.num_blocks, 3 * 4 * 2]
    assert memory.arena.shape[1] == 5 * PAGE, "a window is laid out at once, also where the arena is to be smaller"


def test_a_sliding_layer_holds_its_window_and_no_index() -> None:
    geometry = Geometry(3, 4, 2, 16, torch.float32, key_bits=0, sliding_windows=(PAGE, None, None))
    footprint = DeviceFootprint(geometry, kinds_of(FreeKVConfig(), geometry), index_page_bytes=0)
    # Of 10 pages a window of 32 tokens lies in two, and two layers have two windows of 4 pages.
    assert footprint.tokens([10], [[4, 4]]) == (2 + 8 + 8) * PAGE // 3
    assert footprint.tokens([1], [[4, 4]]) == PAGE


@pytest.mark.parametrize(("window", "first"), [(1, None), (2, 3), (6, 3), (7, 2), (38, 2), (39, 1), (1000, 0)])
def test_a_tail_is_the_pages_that_the_next_token_s_window_still_sees(window: int, first: int | None) -> None:
    """Of a prefix of three pages and five tokens the next token sees window - 1."""
    table = torch.arange(20, 40).view(2, 10)
    pieces = [piece for group in cut_tails(table, [3 * PAGE + 5, 0], 8, PAGE, window) for piece in group]
    if first is None:
        assert not pieces
        return
    (piece,) = pieces
    assert piece.pages.tolist() == list(range(20 + first, 24))
    assert piece.num_tokens == (3 - first) * PAGE + 5


def test_tails_that_do_not_fit_together_are_in_several_groups_and_never_cut() -> None:
    table = torch.arange(40).view(4, 10)
    groups = list(cut_tails(table, [10 * PAGE, 64, 3, 10 * PAGE], 5, PAGE, 3 * PAGE + 1))
    assert [[(p.request, len(p.pages), p.first_token) for p in group] for group in groups] == [
        [(0, 3, 0), (1, 2, 96)],
        [(2, 1, 0), (3, 3, 32)],
    ]
