"""What a selection reads is counted as its ops read it."""

from __future__ import annotations

import pytest
import torch

from freekv_kernels import Half
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.selection_reads import SelectionReads
from tests.support.random_traces import make_trace
from tests.support.simulated_requests import PAGE, SimulatedEngine

GEOMETRY = Geometry(3, 4, 2, 16, torch.float32, key_bits=2)
INDEX_BYTES = 2 * 16 + PAGE * 16 // 4  # of a page, KV head and layer: bounds, and codes


def make(pages: int, **settings: object) -> SimulatedEngine:
    sizes = {"budget_tokens": 5 * PAGE, "sink_tokens": PAGE, "recent_tokens": PAGE, "arena_tokens": 8 * PAGE}
    engine = SimulatedEngine(GEOMETRY, FreeKVConfig(**sizes, **settings), max_requests=1)
    request = engine.start(make_trace(GEOMETRY, pages * PAGE + 40, 0), pages * PAGE - 9)
    engine.prefill_whole(request)
    engine.decode()
    return engine


@pytest.mark.parametrize("pages", [4, 5, 6, 16, 17, 31])
@pytest.mark.parametrize("candidates", [0, 2])
def test_a_step_reads_what_its_lists_say(pages, candidates):
    engine = make(pages, candidates=candidates)
    batch, memory = engine.decoder.last_plan.batch, engine.memory
    expected = 0
    for layer in memory.layers:
        listed = engine.decoder.selectors[layer.kind].score(layer, batch, Half.BACK, engine.scale).pages
        is_over = pages > 5
        num_scored = 2 * pages if listed is None else int((listed >= 0).sum())
        first_level = 0 if num_scored == 2 * pages else 2 * ((pages - 1) // 4 - 1)  # groups between sink and recent
        expected += is_over * (num_scored * INDEX_BYTES + first_level * 2 * 16)
    assert memory.counters.as_dict()["selection_bytes"] == expected


def test_dense_layers_select_nothing():
    one, all_three = make(12, dense_layers=(0, 2)), make(12)
    assert (
        3 * one.memory.counters.as_dict()["selection_bytes"]
        == all_three.memory.counters.as_dict()["selection_bytes"]
        > 0
    )


def test_a_head_with_a_smaller_budget_reads_less():
    reads = SelectionReads(GEOMETRY, FreeKVConfig(budget_tokens=20 * PAGE, candidates=2), 3, 400)
    equal, unequal = reads.bytes([300], [[16, 16]]), reads.bytes([300], [[16, 12]])
    assert 0 < unequal < equal
    assert reads.bytes([300, 300], [[16, 16], [16, 12]]) == equal + unequal
