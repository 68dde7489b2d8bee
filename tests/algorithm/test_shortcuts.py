"""On a CPU, a decode step leaves out what it does not need; whether results stay right is asserted everywhere else."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from freekv_kernels import Ops
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from tests.support.random_traces import make_trace
from tests.support.simulated_requests import PAGE, SimulatedEngine

LAYERS = 2


def make_engine(prompt_tokens: list[int], **rule: object) -> SimulatedEngine:
    geometry = Geometry(LAYERS, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    in_pages = {"budget_tokens": 5, "sink_tokens": 1, "recent_tokens": 1, "arena_tokens": 4}
    config = FreeKVConfig(**{name: pages * PAGE for name, pages in in_pages.items()}, key_bits=2, **rule)
    engine = SimulatedEngine(geometry, config, num_blocks=200)
    for seed, n in enumerate(prompt_tokens):
        engine.prefill_whole(engine.start(make_trace(geometry, n + 60, seed), n))
    return engine


def count_ops(engine: SimulatedEngine) -> Counter[str]:
    """Which ops the next decode step runs, and how often."""
    counted, ops = Counter(), engine.memory.ops

    def counting(name: str):
        def run(*args, **kwargs):
            counted[name] += 1
            return getattr(ops, name)(*args, **kwargs)

        return run

    engine.memory.ops = Ops(*map(counting, Ops._fields))
    engine.decode()
    engine.memory.ops = ops
    return counted


def test_within_the_budget_a_layer_appends_and_attends() -> None:
    engine = make_engine([3 * PAGE + 5, 2 * PAGE + 9])
    assert count_ops(engine) == {"write_tables": 1, "append_tokens": LAYERS}


def test_a_page_that_has_lost_its_block_is_looked_up_and_fetched() -> None:
    engine = make_engine([3 * PAGE + 5])
    engine.forget_blocks(engine.requests[0].pages[1:2])
    counted = count_ops(engine)
    assert counted["fetch_blocks"] == LAYERS
    assert engine.memory.counters.as_dict()["demand_misses"] == LAYERS * engine.geometry.num_kv_heads


def test_pages_are_encoded_when_a_token_is_the_last_of_its_page() -> None:
    """By the op that appends the token, whatever it appends; a step that fills no page does not look for one."""
    engine, given = make_engine([2 * PAGE - 2]), []
    append = engine.memory.ops.append_tokens

    def append_tokens(*args):
        given.append(args[-4] is not None)
        append(*args)

    engine.memory.ops = engine.memory.ops._replace(append_tokens=append_tokens)
    for fills_a_page in (False, True, False):
        given.clear()
        assert count_ops(engine) == {"write_tables": 1, "append_tokens": LAYERS}
        assert given == [fills_a_page] * LAYERS


@pytest.mark.parametrize(
    ("rule", "selections"),
    [
        ({}, {"correct_windows": LAYERS}),
        ({"tau": 0.9}, {"share_pages": LAYERS, "select_pages": 2 * LAYERS}),
    ],
    ids=["gate", "tau"],
)
def test_correction_and_the_next_step_share_their_scores(rule: dict, selections: dict) -> None:
    engine = make_engine([9 * PAGE, 2 * PAGE], **rule)
    for _ in range(4):
        counted = count_ops(engine)
        assert counted["score_pages"] == LAYERS
        chosen = ("share_pages", "correct_windows", "select_pages")
        assert {name: counted[name] for name in chosen if counted[name]} == selections
    assert engine.corrected > 0
