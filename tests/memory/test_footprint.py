"""What is counted as held for running requests is what they hold, token by token and step by step."""

from __future__ import annotations

import pytest
import torch

from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from tests.support.random_traces import make_trace
from tests.support.simulated_requests import PAGE, SimulatedEngine
from tests.support.small_engine import two_requests

GEOMETRY = Geometry(num_layers=3, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
COUNTED = ("device_token_steps", "host_token_steps")


def config(**settings) -> FreeKVConfig:
    sizes = {"sink_tokens": PAGE, "recent_tokens": PAGE, "arena_tokens": 4 * PAGE}
    return FreeKVConfig(**{"budget_tokens": 4 * PAGE, "key_bits": 0, **sizes, **settings})


def counted(engine: SimulatedEngine) -> tuple[int, int]:
    counters = engine.memory.counters.as_dict()
    return tuple(counters[name] for name in COUNTED)


def index_tokens(pages: int, key_bits: int) -> int:
    """Whole tokens: of a page, each channel has two bounds of 8 bits, and PAGE codes, where a token has 64 bits."""
    return pages * (16 + PAGE * key_bits) // 64


@pytest.mark.parametrize("key_bits", [0, 2])
def test_counts_of_two_requests_are_those_of_a_count_by_hand(key_bits: int) -> None:
    """Prompts of 9 and of 2 pages, 5 steps: the first has two windows of 4 pages, the second all of its 3."""
    engine = two_requests(GEOMETRY, config(key_bits=key_bits))
    device, host = counted(engine)
    assert host == sum(9 * PAGE + step + 2 * PAGE + step for step in range(1, 6))
    assert device == 5 * (8 * PAGE + 3 * PAGE + index_tokens(10 + 3, key_bits))


def test_a_dense_layer_holds_every_page() -> None:
    engine = two_requests(GEOMETRY, config(dense_layers=(1,)))
    device, _ = counted(engine)
    assert device == 5 * ((2 * (8 + 3) + (10 + 3)) * PAGE // 3 + index_tokens(10 + 3, 0))


def test_each_request_is_counted_with_its_own_budget() -> None:
    engine = SimulatedEngine(GEOMETRY, config(max_budget_tokens=6 * PAGE))
    for seed, budget in enumerate((4 * PAGE, 5 * PAGE)):
        request = engine.start(make_trace(GEOMETRY, 20 * PAGE, seed), 16 * PAGE, budget_tokens=budget)
        engine.prefill_whole(request)
    engine.decode()
    assert counted(engine) == ((8 + 10) * PAGE + index_tokens(2 * 17, 0), 2 * (16 * PAGE + 1))


def test_prompts_are_not_counted() -> None:
    engine = SimulatedEngine(GEOMETRY, config())
    engine.prefill_whole(engine.start(make_trace(GEOMETRY, 9 * PAGE, 0), 9 * PAGE))
    assert counted(engine) == (0, 0)


@pytest.mark.parametrize("tau", [-1, 0.5, 2])
def test_windows_hold_at_most_what_is_counted_for_them(tau: float) -> None:
    """Blocks of the front and of the back window, which a step stamps: distinct pairs, over all layers."""
    engine = two_requests(GEOMETRY, config(tau=tau))
    engine.leave(engine.requests[1])
    held = 0
    for _ in range(PAGE):
        before, _ = counted(engine)
        engine.decode()
        windows = counted(engine)[0] - before - index_tokens(len(engine.requests[0].pages), 0)
        stamped = int((engine.memory.blocks.tables.last_used >= 2 * engine.memory.blocks.step).sum())
        held = stamped * PAGE // (GEOMETRY.num_layers * GEOMETRY.num_kv_heads)
        assert 4 * PAGE <= held <= windows == 8 * PAGE
    assert held < windows  # sink and recent are in both
