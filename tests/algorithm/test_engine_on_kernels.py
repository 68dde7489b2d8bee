"""The engine on the Triton kernels: on a GPU with FlashInfer, elsewhere in Triton's interpreter with torch attention.

The same simulated requests as for the references, held against the same independent decoder.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import freekv_kernels
from freekv_kernels import Count
from sglang_freekv.algorithm.audit import audit_blocks, audit_windows
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from tests.support.random_traces import make_trace
from tests.support.recorded_steps import GraphEngine, RecordingEngine
from tests.support.reference_checks import WithoutWindows, window_of
from tests.support.simulated_requests import PAGE, SimulatedEngine

ON_GPU = torch.cuda.is_available()
NUM_LAYERS = 2
# FlashInfer has no fp32, and compiles for a minute or more for each head_dim: the one that most models have.
SHAPE = {"head_dim": 128, "dtype": torch.bfloat16} if ON_GPU else {"head_dim": 16, "dtype": torch.float32}
pytestmark = [pytest.mark.gpu] if ON_GPU else []


def make_engine(
    kind: type[SimulatedEngine] = SimulatedEngine,
    page_size: int = PAGE,
    sliding_windows: tuple[int | None, ...] = (),
    logit_cap: float = 0.0,
    **settings: object,
) -> SimulatedEngine:
    in_pages = {"budget_tokens": 5, "sink_tokens": 1, "recent_tokens": 1, "arena_tokens": 4}
    defaults = {name: pages * page_size for name, pages in in_pages.items()} | {"key_bits": 0}
    geometry = Geometry(NUM_LAYERS, num_qo_heads=6, num_kv_heads=2, page_size=page_size, **SHAPE)
    geometry = replace(geometry, sliding_windows=sliding_windows, logit_cap=logit_cap)
    device = "cuda" if ON_GPU else "cpu"
    config = FreeKVConfig(page_size=page_size, **(defaults | settings))
    return kind(geometry, config, max_requests=3, ops=freekv_kernels.triton_ops(), device=device)


SLIDING = {"selector": "codes", "tau": 0.9, "sliding_windows": (70, None), "logit_cap": 2.0}

# Every way that differs in which ops are called, or how; sizes and poolings are the ops' own and in tests/kernels.
CASES = {
    "corrected": {"selector": "codes", "tau": 0.9, "key_bits": 2},
    "speculation-only-no-sink-pages-of-16": {
        **{"tau": -1.0, "sink_tokens": 0, "page_size": 16},
        **{"selector": "codes", "group_pooling": "scaled", "key_bits": 1},
    },
    "by-mass-gated-hysteresis": {"selector": "mass", "key_bits": 2, "hysteresis": 0.05, "gate": 0.01, "candidates": 2},
    "by-mass-scored-at-intervals": {"key_bits": 2, "gate": 0.05, "hysteresis": 0.05, "score_interval": 3},
    "sliding-layer-capped": {"key_bits": 2, **SLIDING},
    "exact-dense-layer-every-page-fetched": {
        **{"tau": 1.01, "dense_layers": (0,), "refetch": True},
        **{"group_pooling": "mean"},
    },
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_chunks_and_steps_of_a_changing_batch_match_the_reference(settings: dict) -> None:
    engine = make_engine(**settings)
    page = engine.page_size
    prompts = {"long": 19 * page + 3, "crosses its budget": 5 * page - 2, "joins": 14 * page}
    requests = [engine.start(make_trace(engine.geometry, n + 40, seed), n) for seed, n in enumerate(prompts.values())]
    engine.prefill([(requests[0], 5 * page + 7), (requests[1], 20)])  # chunks that end inside a page
    engine.prefill_whole(*requests[:2])
    for _ in range(3):
        engine.decode()
    engine.prefill_whole(requests[2])
    for _ in range(2):
        engine.decode()
    engine.leave(requests[0])
    engine.decode()
    audit_blocks(engine.memory)
    audit_windows(engine.decoder)
    counters = engine.memory.counters
    assert counters[Count.RECALLS] > 0 and counters[Count.DEMAND_MISSES] == 0
    assert (engine.corrected > 0) == (engine.config.tau != -1)
    assert (counters[Count.SCORED_ROWS] < counters[Count.ROWS]) == (engine.config.score_interval > 1)


def test_the_baseline_that_a_gpu_may_have_reads_the_latest_pages() -> None:
    engine = make_engine(selector="streaming-llm", tau=-1.0)
    engine.checks = WithoutWindows(engine.memory, engine.rule)
    prompts = (9 * PAGE - 2, 7 * PAGE)
    requests = [engine.start(make_trace(engine.geometry, n + 40, n), n) for n in prompts]
    engine.prefill_whole(*requests)
    for _ in range(4):
        engine.decode()
        for request in requests:
            num_pages = len(request.pages)
            windows = [
                window for layer in range(NUM_LAYERS) for window in window_of(engine.front(layer).cpu(), request)
            ]
            assert windows == [[0, *range(num_pages - 4, num_pages)]] * len(windows)
    audit_windows(engine.decoder)


def test_a_prefix_that_lost_its_blocks_is_fetched_on_demand_once_for_all() -> None:
    engine = make_engine(tau=-1.0, key_bits=2)
    trace = make_trace(engine.geometry, 9 * PAGE + 40, seed=5)
    first = engine.start(trace, 9 * PAGE)
    engine.prefill_whole(first)
    second = engine.start(trace, 9 * PAGE, prefix=first, prefix_tokens=8 * PAGE)
    engine.prefill_whole(second)
    engine.decode()
    engine.forget_blocks(first.pages[:8])
    before = engine.memory.counters.as_dict()
    engine.decode()
    after = engine.memory.counters.as_dict()
    wanted = after["demand_misses"] - before["demand_misses"] + after["misses"] - before["misses"]
    copied = (after["recalled_bytes"] - before["recalled_bytes"]) // engine.geometry.block_bytes
    assert 0 < copied < wanted, "equal requests want equal pages"
    audit_blocks(engine.memory)


@pytest.mark.parametrize(
    "settings",
    [{"tau": 0.9}, {"gate": 0.01, "mass": 0.7}, {"gate": 0.2, "score_interval": 8}, SLIDING],
    ids=["tau", "budgets-by-mass", "intervals", "sliding"],
)
def test_a_recorded_step_can_be_replayed_for_other_batches_and_lengths(settings: dict) -> None:
    """Nothing of a step, but what lies in tensors, is decided between plan and the last layer."""
    engine = make_engine(GraphEngine if ON_GPU else RecordingEngine, key_bits=2, **settings)
    engine.record()
    assert not any(engine.memory.counters.as_dict().values()), "warm-up leaves no trace"
    first = engine.start(make_trace(engine.geometry, 31 * PAGE, 1), 30 * PAGE - 2)
    engine.prefill_whole(first)
    for _ in range(3):  # opens a page
        engine.decode()
    second = engine.start(make_trace(engine.geometry, 6 * PAGE, 2), 5 * PAGE - 1)
    engine.prefill_whole(second)
    for _ in range(3):  # crosses its budget
        engine.decode()
    engine.leave(first)
    engine.decode()
    audit_blocks(engine.memory)
    audit_windows(engine.decoder)
    assert engine.corrected > 0 and engine.kept > 0 and engine.memory.counters[Count.RECALLS] > 0
