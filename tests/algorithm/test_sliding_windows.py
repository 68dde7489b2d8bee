"""Layers with a sliding window, soft-capped logits and sinks, beside layers whose windows are chosen: every chunk and
step against the reference.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from freekv_kernels import Count
from sglang_freekv.algorithm.audit import AuditError, audit_blocks, audit_index, audit_windows
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.layers import kinds_of
from tests.support.random_traces import make_trace
from tests.support.simulated_requests import PAGE, SimulatedEngine

BUDGET = 6 * PAGE


def make_geometry(*windows: int | None, **changes: object) -> Geometry:
    return replace(Geometry(len(windows), 6, 2, 32, torch.float32, PAGE, sliding_windows=windows), **changes)


def make_config(**changes: object) -> FreeKVConfig:
    defaults = {
        "budget_tokens": BUDGET,
        "max_budget_tokens": BUDGET,
        "sink_tokens": PAGE,
        "recent_tokens": PAGE,
        "arena_tokens": 4 * PAGE,
    }
    return FreeKVConfig(**(defaults | changes))


GEOMETRIES = {
    "inside-a-page": make_geometry(20, None),
    "whole-pages": make_geometry(2 * PAGE, None, 2 * PAGE),
    "a-token-more": make_geometry(2 * PAGE + 1, None),
    "of-one-token": make_geometry(1, None),
    "longer-than-the-budget": make_geometry(None, 9 * PAGE),
    "longer-than-any-request": make_geometry(None, 1000 * PAGE),
    "two-widths": make_geometry(70, None, 20, 70),
    "in-every-layer": make_geometry(50, 50),
    "capped": make_geometry(50, None, logit_cap=2.0),
    "capped-without-a-window": make_geometry(None, None, logit_cap=2.0),
    "bf16": make_geometry(50, None, head_dim=64, dtype=torch.bfloat16),
}


def run_batch(engine: SimulatedEngine, num_steps: int = 70) -> None:
    """Prompts of many chunks, one within the budget and one on a prefix of another; joined, left and decoded."""
    g = engine.geometry
    long = engine.start(make_trace(g, 20 * PAGE + 13 + num_steps, 1), 20 * PAGE + 13)
    short = engine.start(make_trace(g, 70 + num_steps, 2), 70)
    engine.prefill([(long, 11 * PAGE + 5), (short, 70)])
    engine.prefill([(long, 1)])
    engine.decode()
    engine.prefill_whole(long)
    for step in range(num_steps - 1):
        if step == 10:
            trace = make_trace(g, 15 * PAGE + num_steps, 3, prefix=long.trace, prefix_tokens=12 * PAGE)
            shared = engine.start(trace, 13 * PAGE + 1, prefix=long, prefix_tokens=12 * PAGE)
            engine.prefill_whole(shared)
        if step == 30:
            engine.leave(short)
        engine.decode()


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_every_chunk_and_step_matches_the_reference(geometry: Geometry) -> None:
    engine = SimulatedEngine(geometry, make_config(), max_requests=3)
    run_batch(engine)
    assert engine.memory.counters[Count.DEMAND_MISSES] == 0, "no page of a sliding window is lost before it is left"
    has_full = any(kind.selects for kind in engine.memory.kinds)
    assert (engine.corrected + engine.kept > 0) == has_full


def test_an_audit_passes_and_finds_a_page_that_is_not_among_the_latest_or_has_no_block() -> None:
    geometry = make_geometry(3 * PAGE, None)
    engine = SimulatedEngine(geometry, make_config(), max_requests=2)
    request = engine.start(make_trace(geometry, 12 * PAGE, 4), 9 * PAGE + 5)
    engine.prefill_whole(request)
    engine.decode()
    memory, table = engine.memory, engine.memory.blocks.tables.table
    audit_blocks(memory)
    audit_index(memory, torch.tensor(request.pages), request.groups)
    audit_windows(engine.decoder)
    held = int(table[0, request.pages[8], 1])
    table[0, request.pages[8], 1] = -1
    with pytest.raises(
        AuditError, match=r"layer 0, row .*, KV head 1: wrong sliding window, a page of it has no block"
    ):
        audit_windows(engine.decoder)
    table[0, request.pages[8], 1] = held
    memory.layers[0].windows[:, request.row, 0, 2] -= 1
    with pytest.raises(AuditError, match=r"layer 0, row .*, KV head 0: wrong sliding window, it is not of the latest"):
        audit_windows(engine.decoder)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_sinks_take_their_share_of_every_softmax(cap: float) -> None:
    geometry = make_geometry(50, None, logit_cap=cap)
    sinks = torch.linspace(-1, 4, 12).view(2, 6)
    engine = SimulatedEngine(geometry, make_config(), max_requests=3, sinks=sinks)
    run_batch(engine, num_steps=40)


def test_a_sliding_layer_has_its_window_on_the_device_and_no_index() -> None:
    geometry = make_geometry(2 * PAGE, None, 2 * PAGE)
    engine = SimulatedEngine(geometry, make_config(), max_requests=3, num_blocks=200)
    memory = engine.memory
    # Two pages, one more for the tokens that a query in mid-page sees, and the page that is opened before one is left.
    assert memory.blocks.num_blocks == [3 * 2 * 4, 200, 3 * 2 * 4]
    assert [memory.index.summary(layer) is None for layer in range(3)] == [True, False, True]
    assert len(memory.index.codes) == len(memory.windows.pages[0]) == len(memory.windows.last_q) == 1
    assert [layer.last_q is None for layer in memory.layers] == [True, False, True]


def test_pages_that_are_lost_from_a_sliding_window_are_fetched_on_demand() -> None:
    geometry = make_geometry(3 * PAGE, None)
    engine = SimulatedEngine(geometry, make_config(), max_requests=2)
    request = engine.start(make_trace(geometry, 12 * PAGE, 4), 9 * PAGE + 5)
    engine.prefill_whole(request)
    engine.decode()
    lost = request.pages[7:9]
    engine.forget_blocks(lost)
    before = engine.memory.counters[Count.DEMAND_MISSES]
    engine.decode()
    in_windows = engine.front(1)[request.row].tolist()
    num_lost = 2 * 2 + sum(page in (7, 8) for window in in_windows for page in window)
    assert engine.memory.counters[Count.DEMAND_MISSES] - before == num_lost
    assert engine.memory.counters[Count.ABSENT_PAGES] == 0


def test_a_model_s_window_comes_before_dense_layers() -> None:
    geometry = make_geometry(50, None)
    kinds = kinds_of(make_config(dense_layers=(0, 1)), geometry)
    assert [kind.name for kind in kinds] == ["sliding", "dense"]
