"""Every selector of the registry: what holds of its windows, whatever pages it likes best."""

from __future__ import annotations

import pytest
import torch

from freekv_kernels import Count, Half
from sglang_freekv.algorithm.audit import audit_blocks, audit_index, audit_windows
from sglang_freekv.algorithm.selectors import SELECTORS
from sglang_freekv.config import BASELINES, FreeKVConfig
from sglang_freekv.config import SELECTORS as NAMES
from sglang_freekv.memory.budgets import Budgets
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.page_indexes import INDEXES
from tests.support.random_traces import make_trace
from tests.support.reference_checks import Request, WithoutWindows
from tests.support.simulated_requests import PAGE, SimulatedEngine

GEOMETRY = Geometry(num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)


def make_engine(selector: str, budget_pages: int) -> tuple[SimulatedEngine, Request]:
    """A request of 9 pages, decoding."""
    config = FreeKVConfig(
        budget_tokens=budget_pages * PAGE,
        sink_tokens=PAGE,
        recent_tokens=PAGE,
        arena_tokens=4 * PAGE,
        selector=selector,
    )
    engine = SimulatedEngine(GEOMETRY, config)
    request = engine.start(make_trace(GEOMETRY, 12 * PAGE, seed=0), 9 * PAGE - 3)
    engine.prefill_whole(request)
    return engine, request


def test_flags_selectors_and_indexes_have_the_same_names():
    assert set(NAMES) == set(SELECTORS) == set(INDEXES)
    assert {FreeKVConfig(selector=name).selector_name for name in NAMES} == set(NAMES)
    assert set(BASELINES) == {name for name, selector in SELECTORS.items() if selector.baseline is not None}


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_budget_that_covers_the_context_reproduces_full_attention(selector):
    engine, _ = make_engine(selector, budget_pages=12)
    for _ in range(PAGE):
        engine.decode()  # held against the reference, which then attends to everything
    assert engine.memory.counters[Count.ROWS] == 0


@pytest.mark.parametrize("selector", SELECTORS)
def test_windows_over_the_budget_have_their_form_and_are_what_the_selector_selects(selector):
    engine, request = make_engine(selector, budget_pages=4)
    engine.checks = WithoutWindows(engine.memory, engine.rule)
    for _ in range(PAGE):
        engine.decode()
        audit_windows(engine.decoder)
        audit_blocks(engine.memory)
    audit_index(engine.memory, torch.tensor(request.pages), request.groups)
    assert engine.memory.counters[Count.ROWS] > 0 and engine.memory.counters[Count.ABSENT_PAGES] == 0


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_plan_counts_the_bytes_of_the_index_that_the_memory_allocates(selector):
    engine, _ = make_engine(selector, budget_pages=4)
    memory = engine.memory
    index = INDEXES[memory.config.selector_name]
    assert memory.index.nbytes == memory.host.num_host_pages * index.page_bytes(memory.geometry)


@pytest.mark.parametrize("selector", SELECTORS)
def test_scores_of_a_flagged_row_are_those_of_all_rows(selector):
    engine, _ = make_engine(selector, budget_pages=4)
    engine.checks = WithoutWindows(engine.memory, engine.rule)
    engine.decode()
    decode, layer = engine.decoder, engine.memory.layers[1]
    batch, flags = decode.last_plan.batch, decode.last_plan.flags[1]
    flags.rows[0], flags.count[0] = 1, 1
    own = decode.selectors[layer.kind]
    full_pages = int(batch.num_pages[0]) - 1  # only full pages have a score by codes
    scores = [own.score(layer, batch, Half.FRONT, engine.scale, x).values for x in (None, flags)]
    every, one = (values[1, :, :full_pages] for values in scores)
    torch.testing.assert_close(one, every)


class Halved(Budgets):
    """A policy that gives the second head two pages less."""

    def share(self, budget_pages: int) -> list[int]:
        return [budget_pages, budget_pages - 2]


def test_heads_of_a_request_may_have_budgets_of_their_own():
    engine, request = make_engine("codes", budget_pages=6)
    engine.checks = WithoutWindows(engine.memory, engine.rule)
    memory = engine.memory
    memory.budgets = Halved(GEOMETRY, memory.max_requests, memory.sizes, memory.config.mass, "cpu")
    newcomer = engine.start(make_trace(GEOMETRY, 12 * PAGE, seed=1), 5 * PAGE - 3)  # over the budget of one head only
    engine.leave(request)
    engine.prefill_whole(newcomer)
    for _ in range(2 * PAGE):
        engine.decode()
        audit_windows(engine.decoder)
        audit_blocks(engine.memory)
    lengths = [(engine.front(layer)[newcomer.row] >= 0).sum(-1).tolist() for layer in range(2)]
    assert lengths == [[6, 4]] * 2
    assert engine.memory.counters[Count.ABSENT_PAGES] == 0
