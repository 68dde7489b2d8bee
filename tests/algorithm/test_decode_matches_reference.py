"""Decode steps against the reference: windows, corrections, blocks, outputs and counters, step by step."""

from __future__ import annotations

import pytest
import torch

from freekv_kernels import Count
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.windows import WindowSizes
from tests.support.random_traces import Trace, make_trace
from tests.support.reference_checks import DecodedToken, Request, window_of
from tests.support.simulated_requests import PAGE, SimulatedEngine

NUM_LAYERS, BUDGET, MAX_BUDGET = 2, 6 * PAGE, 7 * PAGE  # of pages of the usual size


def make_geometry(
    group_size: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    page_size: int = PAGE,
) -> Geometry:
    return Geometry(NUM_LAYERS, group_size * num_kv_heads, num_kv_heads, head_dim, dtype, page_size)


def make_config(page_size: int = PAGE, **changes: object) -> FreeKVConfig:
    defaults = {
        "budget_tokens": 6 * page_size,
        "max_budget_tokens": 7 * page_size,
        "sink_tokens": page_size,
        "recent_tokens": 2 * page_size,
        "tau": 0.9,
        "arena_tokens": 16 * page_size,
        "page_size": page_size,
        "key_bits": 0,
    }
    return FreeKVConfig(**(defaults | changes))


CASES = {
    "speculation-only": (make_geometry(group_size=4), make_config(tau=-1.0)),
    "corrected": (make_geometry(3, head_dim=16), make_config(selector="codes", recent_tokens=PAGE, key_bits=2)),
    "exact": (make_geometry(group_size=8, num_kv_heads=1, head_dim=64), make_config(tau=1.01)),
    "one-query-head-per-kv-head": (make_geometry(1, 4), make_config(sink_tokens=2 * PAGE, recent_tokens=PAGE)),
    "mean-pooling": (make_geometry(group_size=4), make_config(group_pooling="mean")),
    "mean-pooling-speculation-only": (make_geometry(3), make_config(tau=-1.0, group_pooling="mean")),
    "pages-of-16-scaled-pooling": (
        make_geometry(page_size=16),
        make_config(16, selector="codes", group_pooling="scaled", key_bits=1),
    ),
    "pages-of-64-max-pooling": (
        make_geometry(page_size=64),
        make_config(64, selector="codes", group_pooling="max", key_bits=4),
    ),
    "by-mass": (make_geometry(group_size=3), make_config(selector="mass", key_bits=2)),
    "by-mass-hysteresis": (
        make_geometry(group_size=4),
        make_config(selector="mass", key_bits=1, hysteresis=0.05, recent_tokens=PAGE),
    ),
    "gated": (make_geometry(group_size=3), make_config(selector="mass", key_bits=2, tau=None, gate=0.02)),
    "two-levels": (
        make_geometry(group_size=3),
        make_config(selector="mass", key_bits=2, tau=None, gate=0.02, sink_tokens=0, recent_tokens=PAGE, candidates=2),
    ),
    "gated-hysteresis-no-sink": (
        make_geometry(group_size=4),
        make_config(selector="mass", key_bits=2, tau=None, gate=0.01, hysteresis=0.3, sink_tokens=0),
    ),
    "gated-scored-at-intervals": (
        make_geometry(group_size=2),
        make_config(selector="mass", key_bits=2, tau=None, gate=0.2, score_interval=3, recent_tokens=PAGE),
    ),
    "budgets-by-mass": (
        make_geometry(group_size=3, num_kv_heads=3),
        make_config(selector="mass", key_bits=2, tau=None, gate=0.02, mass=0.8, recent_tokens=PAGE),
    ),
    "budgets-by-mass-by-tau": (
        make_geometry(group_size=2, num_kv_heads=4),
        make_config(selector="mass", key_bits=2, tau=0.9, mass=0.6, recent_tokens=PAGE, hysteresis=0.2),
    ),
    "hysteresis-scaled-pooling": (make_geometry(), make_config(hysteresis=0.02, group_pooling="scaled")),
    "no-sink": (make_geometry(group_size=3), make_config(sink_tokens=0)),
    "dense-layer": (make_geometry(group_size=3), make_config(dense_layers=(0,), hysteresis=0.0, key_bits=2)),
    "bf16": (make_geometry(4, 2, 64, torch.bfloat16), make_config(key_bits=2)),
    "bf16-exact-mean-pooling": (
        make_geometry(8, 2, 32, torch.bfloat16),
        make_config(tau=1.01, group_pooling="mean"),
    ),
}


def selections(tokens: list[DecodedToken], config: FreeKVConfig) -> dict[tuple, list[int]]:
    """The pages that were really chosen, per (request, layer, head): neither sink nor recent ones."""
    chosen, sizes = {}, WindowSizes.of(config, config.page_size)
    for token in tokens:
        for layer, expected in enumerate(token.expected):
            for head, window in enumerate(expected.windows):
                if expected.over_budget:
                    pages = window[sizes.sink : len(window) - sizes.recent]
                    chosen[id(token.request), layer, head] = pages
    return chosen


def run_changing_batch(engine: SimulatedEngine) -> int:
    """Requests of all kinds join and leave; returns how often a selection changed between steps."""

    def start(seed: int, prompt_tokens: int, budget_tokens: int | None = None) -> Request:
        trace = make_trace(engine.geometry, prompt_tokens + 60, seed)
        mass = 0.0 if seed == 4 and engine.config.mass is not None else None  # one request has fixed budgets
        request = engine.start(trace, prompt_tokens, budget_tokens=budget_tokens, mass=mass)
        engine.prefill_whole(request)
        return request

    page, budget, max_budget = engine.page_size, engine.config.budget_tokens, engine.config.max_budget_tokens
    running = {"long": start(1, 20 * page + 13), "crosses its budget": start(2, budget - 9)}
    joining = {
        5: ("within its budget", 3, page + 1, max_budget),
        19: ("small budget", 4, 20 * page, 5 * page),
        21: ("on the row of another", 5, 32 * page - 1, max_budget),
    }
    leaving = {14: "crosses its budget", 18: "long", 28: "within its budget"}
    num_changes, before = 0, {}
    for step in range(40):
        if step in joining:
            name, *what = joining[step]
            running[name] = start(*what)
        if step in leaving:
            engine.leave(running[leaving[step]])
        now = selections(engine.decode(), engine.config)
        num_changes += sum(pages != before.get(key, pages) for key, pages in now.items())
        before = now
    return num_changes


# With a block for every page nothing is recalled; the rest is the same, so not all cases need it.
PLENTIFUL = ("speculation-only", "corrected", "dense-layer", "bf16-exact-mean-pooling")
SCARCE_OR_PLENTIFUL = [(name, False) for name in CASES] + [(name, True) for name in PLENTIFUL]


@pytest.mark.parametrize(
    ("geometry", "config", "plentiful"),
    [
        pytest.param(*CASES[name], plentiful, id=f"{name}-{'plentiful' if plentiful else 'scarce'}-blocks")
        for name, plentiful in SCARCE_OR_PLENTIFUL
    ],
)
def test_every_step_of_a_changing_batch_matches_the_reference(
    geometry: Geometry, config: FreeKVConfig, plentiful: bool
) -> None:
    engine = SimulatedEngine(geometry, config, max_requests=3, num_blocks=1000 if plentiful else None)
    num_changes = run_changing_batch(engine)
    assert engine.memory.counters[Count.DEMAND_MISSES] == 0, "no page was replaced, so none may be lost"
    assert num_changes > 25, "the selection has to move for this test to mean something"
    assert (engine.corrected > 0) == (config.tau != -1)
    assert (engine.kept > 0) == (config.tau is None or config.tau < 1)
    assert (engine.memory.counters[Count.RECALLS] > 0) != plentiful
    rows, scored = (engine.memory.counters[count] for count in (Count.ROWS, Count.SCORED_ROWS))
    assert (0 < scored < rows) if config.score_interval > 1 else scored >= rows


def test_sink_and_recent_may_be_the_whole_budget() -> None:
    config = make_config(budget_tokens=3 * PAGE, max_budget_tokens=3 * PAGE, key_bits=2)
    engine = SimulatedEngine(make_geometry(), config, max_requests=1)
    request = engine.start(make_trace(engine.geometry, 12 * PAGE, seed=1), 9 * PAGE + 30)
    engine.prefill_whole(request)
    for _ in range(6):
        engine.decode()
        last = len(request.pages) - 1
        assert window_of(engine.front(0), request) == [[0, last - 1, last]] * 2


def make_shared(engine: SimulatedEngine, prefix_pages: int, num_requests: int) -> list[Request]:
    """Start requests with equal tokens on one copy of their prefix."""
    trace = make_trace(engine.geometry, prefix_pages * PAGE + 60, seed=7)
    prompt_tokens = prefix_pages * PAGE + 20
    first = engine.start(trace, prompt_tokens)
    engine.prefill_whole(first)
    others = [
        engine.start(trace, prompt_tokens, prefix=first, prefix_tokens=prefix_pages * PAGE)
        for _ in range(num_requests - 1)
    ]
    if others:
        engine.prefill_whole(*others)
    return [first, *others]


def recalls_on_shared_prefix(num_requests: int) -> int:
    """Number of recalls while requests decode over one prefix that no block holds at the start."""
    engine = SimulatedEngine(make_geometry(), make_config(key_bits=2), num_blocks=1000)
    requests = make_shared(engine, prefix_pages=12, num_requests=num_requests)
    prefix = requests[0].pages[:12]
    assert all(request.pages[:12] == prefix for request in requests)
    engine.forget_blocks(prefix)
    before = engine.memory.counters[Count.RECALLS]
    for _ in range(12):
        engine.decode()
    num_recalls = engine.memory.counters[Count.RECALLS] - before
    table = engine.memory.blocks.tables.table
    assert num_recalls == int((table[:, prefix] >= 0).sum()), "one recall for each block"
    return num_recalls


def test_requests_that_share_a_prefix_share_its_blocks_and_recalls() -> None:
    alone = recalls_on_shared_prefix(1)
    assert alone > 0
    assert recalls_on_shared_prefix(3) == alone


@pytest.mark.parametrize("budget_tokens", [BUDGET, MAX_BUDGET], ids=["over-budget", "within-budget"])
def test_pages_that_are_replaced_between_steps_are_fetched_on_demand(budget_tokens: int) -> None:
    engine = SimulatedEngine(make_geometry(), make_config(tau=-1.0, key_bits=1))
    trace = make_trace(engine.geometry, 9 * PAGE + 40, seed=8)
    in_tree = engine.start(trace, 9 * PAGE)
    engine.prefill_whole(in_tree)
    request = engine.start(trace, 9 * PAGE + 5, budget_tokens=budget_tokens)
    engine.prefill_whole(request)
    for _ in range(3):
        engine.decode()

    counters = engine.memory.counters
    pages = in_tree.pages[:9]
    engine.hold(pages)
    engine.leave(in_tree)
    engine.forget_blocks(pages)
    assert counters[Count.DEMAND_MISSES] == 0
    windows = [window_of(engine.back(layer), request) for layer in range(NUM_LAYERS)]
    num_lost = sum(sum(page < 9 for page in window) for heads in windows for window in heads)
    assert num_lost > 0

    engine.replace_pages(request, pages)
    engine.decode()
    assert counters[Count.DEMAND_MISSES] == num_lost
    for _ in range(3):
        engine.decode()


@pytest.mark.parametrize("is_lost", [False, True], ids=["resident", "fetched-on-demand"])
@pytest.mark.parametrize("prompt_pages", [5, 12], ids=["within-budget", "over-budget"])
def test_prefill_takes_no_block_that_a_running_request_reads(prompt_pages: int, is_lost: bool) -> None:
    engine = SimulatedEngine(make_geometry(), make_config(tau=-1.0), max_requests=2)
    request = engine.start(make_trace(engine.geometry, prompt_pages * PAGE + 40, seed=9), prompt_pages * PAGE)
    engine.prefill_whole(request)
    engine.decode()
    counters, blocks = engine.memory.counters, engine.memory.blocks
    if is_lost:
        engine.forget_blocks(request.pages[:prompt_pages])
    engine.decode()
    num_lost = counters[Count.DEMAND_MISSES]
    assert (num_lost > 0) == is_lost
    # As many pages as there are blocks, so their prefill takes every block that may be taken; then the first
    # windows are fetched. The newcomers but the last are aborted at once.
    num_tokens = blocks.num_blocks[0] // engine.geometry.num_kv_heads * PAGE
    trace = make_trace(engine.geometry, num_tokens + 1, seed=10)
    for _ in range(4):
        for newcomer in engine.requests[1:]:
            engine.leave(newcomer)
        engine.prefill_whole(engine.start(trace, num_tokens))
    engine.decode()
    assert counters[Count.DEMAND_MISSES] == num_lost


def perpendicular_to(x: torch.Tensor) -> torch.Tensor:
    """Vectors as long as those of `x [n, D]`, at right angles to them."""
    return torch.stack((-x[:, 1::2], x[:, ::2]), dim=-1).flatten(1)


def test_a_group_is_flagged_by_the_mean_of_its_cosines() -> None:
    """One head of four that turns leaves the mean above tau; two do not."""
    engine = SimulatedEngine(make_geometry(group_size=4, num_kv_heads=1), make_config())
    trace = make_trace(engine.geometry, 10 * PAGE + 2, seed=11)
    q = trace.q.clone()
    last = q[:, 10 * PAGE - 1]
    q[:, 10 * PAGE :] = last[:, None]
    q[:, 10 * PAGE, 0] = 0.8 * last[:, 0] + 0.6 * perpendicular_to(last[:, 0])  # a mean of 0.95
    q[:, 10 * PAGE + 1, :2] *= -1
    request = engine.start(Trace(q, trace.k, trace.v), 10 * PAGE)
    engine.prefill_whole(request)
    flagged = [[expected.flagged for expected in engine.decode()[0].expected] for _ in range(2)]
    assert flagged == [[[False]] * NUM_LAYERS, [[True]] * NUM_LAYERS]
