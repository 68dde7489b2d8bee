"""Prefill against dense causal attention; host pages and summaries are compared after every chunk."""

from __future__ import annotations

import pytest
import torch

from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from tests.support.random_traces import make_trace
from tests.support.reference_checks import OUTPUT_TOLERANCE
from tests.support.simulated_requests import PAGE, SimulatedEngine

NUM_LAYERS = 3  # more than the arena has halves
GEOMETRIES = {
    "one-query-head-per-kv-head": Geometry(NUM_LAYERS, 3, 3, 16, torch.float32),
    "group-of-4": Geometry(NUM_LAYERS, 8, 2, 32, torch.float32),
    "group-of-8-bf16": Geometry(NUM_LAYERS, 8, 1, 64, torch.bfloat16),
}
ARENA_PAGES = {"smaller-than-one-prefix": 1, "smaller-than-all-prefixes": 5, "plentiful": 64}

every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
every_arena = pytest.mark.parametrize("arena_pages", ARENA_PAGES.values(), ids=ARENA_PAGES)


def make_engine(geometry: Geometry, arena_pages: int, budget_tokens: int = 6 * PAGE) -> SimulatedEngine:
    config = FreeKVConfig(
        budget_tokens=budget_tokens,
        max_budget_tokens=budget_tokens,
        sink_tokens=PAGE,
        recent_tokens=PAGE,
        arena_tokens=arena_pages * PAGE,
    )
    return SimulatedEngine(geometry, config)


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, is_causal: bool
) -> torch.Tensor:
    """Attention of torch, `[n, Hq, D]`, in float32; a second opinion beside the reference decoder."""
    q, k, v = (x.float().transpose(0, 1)[None] for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, scale=scale, is_causal=is_causal, enable_gqa=True)[0].transpose(0, 1)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = OUTPUT_TOLERANCE[out.dtype]
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


@every_arena
@every_geometry
def test_chunks_that_end_inside_a_page_give_dense_causal_attention(geometry: Geometry, arena_pages: int) -> None:
    chunks = [45, 1, 18, 64, 7, 100, 15, 1]
    engine = make_engine(geometry, arena_pages)
    trace = make_trace(geometry, sum(chunks), seed=1)
    request = engine.start(trace, sum(chunks))
    outputs = torch.cat([engine.prefill([(request, num_tokens)])[0] for num_tokens in chunks], dim=1)
    for layer in range(NUM_LAYERS):
        assert_close(
            outputs[layer],
            dense_attention(trace.q[layer], trace.k[layer], trace.v[layer], scale=engine.scale, is_causal=True),
        )


@every_arena
@every_geometry
def test_a_batch_of_unequal_requests_gives_each_its_own_attention(geometry: Geometry, arena_pages: int) -> None:
    engine = make_engine(geometry, arena_pages)
    schedule = [  # tokens of each request per batch; 0 where it does not take part
        (70, 3, 0, 0),
        (33, 0, 31, 128),
        (1, 96, 1, 0),
        (60, 5, 40, 9),
    ]
    totals = [sum(chunks) for chunks in zip(*schedule, strict=True)]
    requests = [engine.start(make_trace(geometry, total, seed), total) for seed, total in enumerate(totals)]
    for chunks in schedule:
        # The engine compares the outputs with the reference.
        engine.prefill([(request, n) for request, n in zip(requests, chunks, strict=True) if n])
    assert all(request.is_decoding for request in requests)


@every_arena
@every_geometry
def test_a_prefix_hit_reads_the_pages_of_another_request(geometry: Geometry, arena_pages: int) -> None:
    engine = make_engine(geometry, arena_pages)
    first = engine.start(make_trace(geometry, 240, seed=2), 230)
    engine.prefill_whole(first)
    engine.decode()
    num_free = len(engine.free_pages)
    hits = []
    for seed, prefix_pages in ((3, 7), (4, 3), (5, 7)):
        prefix_tokens = prefix_pages * PAGE
        trace = make_trace(geometry, prefix_tokens + 50, seed, prefix=first.trace, prefix_tokens=prefix_tokens)
        hits.append(engine.start(trace, prefix_tokens + 40, prefix=first, prefix_tokens=prefix_tokens))
    outputs = engine.prefill([(request, 40) for request in hits])
    assert num_free - len(engine.free_pages) == 3 * 2, "a hit takes no pages for its prefix"
    for request, out in zip(hits, outputs, strict=True):
        for layer in range(NUM_LAYERS):
            inputs = (x[layer, : request.length] for x in (request.trace.q, request.trace.k, request.trace.v))
            expected = dense_attention(*inputs, scale=engine.scale, is_causal=True)
            assert_close(out[layer], expected[-40:])
    engine.decode()


def test_a_prefix_hit_after_the_first_request_left_reads_the_host_store() -> None:
    geometry = GEOMETRIES["group-of-4"]
    engine = make_engine(geometry, arena_pages=3)
    first = engine.start(make_trace(geometry, 200, seed=6), 200)
    engine.prefill_whole(first)
    in_tree = first.pages[:6]
    engine.hold(in_tree)
    engine.leave(first)
    engine.forget_blocks(in_tree)
    request = engine.start(first.trace, 200, prefix=first, prefix_tokens=6 * PAGE)
    engine.prefill_whole(request)


@every_geometry
def test_decoding_within_the_budget_is_full_attention(geometry: Geometry) -> None:
    engine = make_engine(geometry, arena_pages=4, budget_tokens=9 * PAGE)
    traces = [make_trace(geometry, 9 * PAGE, seed) for seed in (7, 8, 9)]
    for trace, chunks in zip(traces, ([100, 70, 70], [1], [32, 31]), strict=True):
        request = engine.start(trace, sum(chunks))
        for num_tokens in chunks:
            engine.prefill([(request, num_tokens)])
    for _ in range(48):  # the first request ends exactly at its budget
        for token in engine.decode():
            trace, length = token.request.trace, token.request.length
            for layer in range(NUM_LAYERS):
                expected = dense_attention(
                    trace.q[layer, length - 1 : length],
                    trace.k[layer, :length],
                    trace.v[layer, :length],
                    scale=engine.scale,
                    is_causal=False,
                )
                assert_close(token.outputs[layer], expected[0])
    assert engine.requests[0].length == engine.config.budget_tokens
    assert engine.corrected + engine.kept == 0
