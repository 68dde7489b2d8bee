"""Pages that change their owner; `tools/fuzz` does it ten thousand times.

All keys and values are random numbers, so any value that outlives its request, is read before it is written
or comes from another page differs from what the reference expects.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sglang_freekv.algorithm.audit import audit_blocks
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from tests.support.random_traces import make_trace
from tests.support.simulated_requests import PAGE, SimulatedEngine
from tests.support.small_engine import two_requests

GEOMETRY = Geometry(num_layers=1, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
CONFIG = FreeKVConfig(
    budget_tokens=4 * PAGE,
    max_budget_tokens=5 * PAGE,
    sink_tokens=PAGE,
    recent_tokens=PAGE,
    arena_tokens=4 * PAGE,
    key_bits=1,
)


@pytest.fixture
def engine() -> SimulatedEngine:
    return two_requests(GEOMETRY, CONFIG)


def test_a_page_that_changes_owner_forgets_its_blocks_and_only_its_own(engine: SimulatedEngine) -> None:
    first, second = engine.requests
    table = engine.memory.blocks.tables.table
    assert (table[0, first.pages + second.pages] >= 0).all()
    kept = table[0, second.pages].clone()
    engine.forget_blocks(first.pages)
    assert (table[0, first.pages] == -1).all()
    owner = engine.memory.blocks.owner(0)
    assert not torch.isin(owner // GEOMETRY.num_kv_heads, torch.tensor(first.pages)).any()
    assert table[0, second.pages].equal(kept)
    engine.memory.check_integrity()


def test_a_request_on_reused_pages_sees_only_its_own_tokens(engine: SimulatedEngine) -> None:
    old = engine.requests[0]
    engine.leave(old)
    newcomer = engine.start(make_trace(GEOMETRY, 10 * PAGE, seed=9), 9 * PAGE)
    engine.prefill([(newcomer, 5 * PAGE + 1)])
    assert set(newcomer.pages) < set(old.pages)
    audit_blocks(engine.memory)
    engine.prefill_whole(newcomer)
    for _ in range(PAGE):
        engine.decode()
        audit_blocks(engine.memory)


def test_a_step_that_has_not_run_keeps_the_budget_of_its_request_when_the_row_gets_another(
    engine: SimulatedEngine,
) -> None:
    budgets = engine.memory.budgets.pages
    old = engine.requests[0]
    engine.leave(old)
    newcomer = engine.start(make_trace(GEOMETRY, 10 * PAGE, seed=9), 9 * PAGE, budget_tokens=5 * PAGE)
    engine.prefill([(newcomer, 5 * PAGE + 1)])
    assert newcomer.row == old.row
    assert (budgets[old.row] == 4).all()
    engine.prefill_whole(newcomer)
    assert (budgets[old.row] == 5).all()


def test_a_memory_that_starts_over_has_other_settings_and_the_same_pages(engine: SimulatedEngine) -> None:
    old, other = engine.requests
    engine.hold(old.pages)
    for request in (old, other):
        engine.leave(request)
    engine.start_over(replace(CONFIG, budget_tokens=3 * PAGE, max_budget_tokens=3 * PAGE), num_blocks=12)
    memory = engine.memory
    assert memory.blocks.num_resident == memory.counters.decoded_tokens == int(memory.blocks.step) == 0
    newcomer = engine.start(old.trace, 8 * PAGE, prefix=old, prefix_tokens=6 * PAGE)
    engine.prefill_whole(newcomer)
    for _ in range(PAGE):
        engine.decode()  # checked against the reference
    audit_blocks(memory)
    memory.check_integrity()
    assert (memory.layers[0].windows[:, newcomer.row] >= 0).sum(-1).eq(3).all()
