"""A small engine in the middle of decoding, for tests that then do something to it."""

from __future__ import annotations

from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from tests.support.random_traces import make_trace
from tests.support.simulated_requests import PAGE, SimulatedEngine


def two_requests(geometry: Geometry, config: FreeKVConfig) -> SimulatedEngine:
    """Two requests that decode, the first over its budget and the second within, and blocks that are free."""
    engine = SimulatedEngine(geometry, config, num_blocks=200)
    for seed, prompt_tokens in enumerate([9 * PAGE, 2 * PAGE]):
        request = engine.start(make_trace(geometry, prompt_tokens + 60, seed), prompt_tokens)
        engine.prefill_whole(request)
    for _ in range(5):
        engine.decode()
    return engine
