"""With `--freekv-refetch` a step copies all pages of the windows it selects, and computes what it does without."""

from __future__ import annotations

import torch

from freekv_kernels import Count
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from tests.support.random_traces import make_trace
from tests.support.simulated_requests import PAGE, SimulatedEngine

LAYERS, KV_HEADS, BUDGET = 2, 2, 5


def decode_and_count(refetch: bool, steps: int = 6) -> list[torch.Tensor]:
    """What each step counts of a request over its budget and one within; the engine checks the outputs."""
    geometry = Geometry(LAYERS, num_qo_heads=4, num_kv_heads=KV_HEADS, head_dim=16, dtype=torch.float32)
    in_pages = {"budget_tokens": BUDGET, "sink_tokens": 1, "recent_tokens": 1, "arena_tokens": 4}
    config = FreeKVConfig(**{name: pages * PAGE for name, pages in in_pages.items()}, refetch=refetch)
    engine = SimulatedEngine(geometry, config, num_blocks=200)
    for seed, prompt_tokens in enumerate([9 * PAGE + 3, 2 * PAGE]):
        engine.prefill_whole(engine.start(make_trace(geometry, prompt_tokens + 60, seed), prompt_tokens))
    counted = []
    for _ in range(steps):
        before = engine.memory.counters.values.clone()
        engine.decode()
        counted.append(engine.memory.counters.values - before)
    return counted


def test_every_page_of_a_selected_window_is_copied_and_nothing_else_changes() -> None:
    recalls = int(Count.RECALLS)
    others = [c for c in Count if c != Count.RECALLS]
    for cached, fetched in zip(decode_and_count(refetch=False), decode_and_count(refetch=True), strict=True):
        assert torch.equal(cached[others], fetched[others])
        # A corrected row recalls what it misses before; nothing else is copied beside the windows of the next step.
        of_windows = LAYERS * KV_HEADS * BUDGET
        assert of_windows <= fetched[recalls] <= of_windows + cached[Count.MISSES]
        assert cached[recalls] < fetched[recalls]
