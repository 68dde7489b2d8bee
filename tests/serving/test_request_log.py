"""The line of a request that has ended: what it says is what the memory holds, and nobody waits for a GPU."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest
import torch

from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.layers import WINDOWED
from sglang_freekv.memory.units import in_words
from sglang_freekv.serving.radix_cache import FreeKVRadixCache, host_store
from sglang_freekv.serving.request_log import RequestLog
from tests.support.random_traces import make_trace
from tests.support.reference_checks import Request
from tests.support.releases import of_release
from tests.support.simulated_requests import PAGE, SimulatedEngine

LINE = re.compile(
    r"FreeKV request: ([\d,]+) \+ ([\d,]+) tokens, of which a step attended to ([\d,]+) \((\d+)% at the end\)"
    r"(?:; (\d+)% of its KV on the device at the end. Since the last such line (\d+)% of rows were corrected, "
    r"(.+) recalled per token)?"
)


@pytest.fixture
def engine() -> SimulatedEngine:
    """Five steps into decoding: a request over its budget, whose pages are more than the device has blocks for, and one
    within.
    """
    config = FreeKVConfig(budget_tokens=4 * PAGE, sink_tokens=PAGE, recent_tokens=PAGE, tau=0.5)
    geometry = Geometry(3, 4, 2, 16, torch.float32)
    engine = SimulatedEngine(geometry, config, max_requests=2)
    for seed, prompt_tokens in enumerate([20 * PAGE, 2 * PAGE]):
        request = engine.start(make_trace(geometry, prompt_tokens + 20, seed), prompt_tokens)
        engine.prefill_whole(request)
    for _ in range(5):
        engine.decode()
    return engine


def ended(request: Request, num_new: int = 6) -> SimpleNamespace:
    """A request as SGLang's scheduler has it."""
    return of_release.request(request.row, origin_input_ids=[1] * request.prompt_tokens, output_ids=[1] * num_new)


def slots(engine: SimulatedEngine, request: Request) -> torch.Tensor:
    return engine.req_to_token[request.row, : request.length]


def lines(caplog: pytest.LogCaptureFixture) -> list[re.Match]:
    return [match for record in caplog.records if (match := LINE.fullmatch(record.message))]


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sglang_freekv")  # whatever another test has set


def test_it_says_what_was_attended_to_and_how_much_is_on_the_device(engine, caplog):
    request = engine.requests[0]
    table = engine.memory.blocks.tables.table
    assert 0 < (table[:, request.pages] >= 0).float().mean() < 1
    RequestLog(engine.memory).end(ended(request), slots(engine, request))
    (line,) = lines(caplog)
    assert [int(number) for number in line.groups()[:3]] == [20 * PAGE, 6, 4 * PAGE]
    assert int(line[4]) == round(100 * 4 * PAGE / request.length)
    assert int(line[5]) == round(100 * (table[:, request.pages] >= 0).float().mean().item())


def test_what_it_took_is_counted_since_the_last_line(engine, caplog):
    request, log = engine.requests[0], RequestLog(engine.memory)
    log.end(ended(request), slots(engine, request))
    before = engine.memory.counters.as_dict()
    for _ in range(3):
        engine.decode()
    log.end(ended(request, 9), slots(engine, request))
    after = engine.memory.counters.as_dict()
    grown = {name: after[name] - before[name] for name in after}
    flagged, recalled = int(lines(caplog)[1][6]), lines(caplog)[1][7]
    assert flagged == round(100 * grown["flagged_rows"] / grown["rows"])
    assert recalled == in_words(grown["recalled_bytes"] / grown["decoded_tokens"])
    assert grown["decoded_tokens"] == 6 and grown["recalled_bytes"] > 0


def test_a_request_within_its_budget_gets_no_line_nor_does_one_without_a_decode_step(engine, caplog):
    log = RequestLog(engine.memory)
    over, within = engine.requests
    log.end(ended(within), slots(engine, within))
    log.end(ended(over, num_new=1), slots(engine, over))
    assert not caplog.records


def test_on_a_gpu_nothing_is_read_back(engine, caplog):
    request = engine.requests[0]
    geometry, budgets = engine.memory.geometry, engine.memory.budgets
    memory = SimpleNamespace(
        device="cuda", geometry=geometry, budgets=budgets, kinds=(WINDOWED,)
    )  # neither blocks nor counters
    RequestLog(memory).end(ended(request), slots(engine, request).to("meta"))  # tensors without values
    (line,) = lines(caplog)
    assert line[3] == str(4 * PAGE) and line[5] is None


@pytest.mark.parametrize("has_finished", [True, False])
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_one_rank_logs_requests_that_have_finished_and_none_that_are_retracted(rank, has_finished, monkeypatch):
    monkeypatch.setattr(host_store, "get_rank", lambda group: rank)
    asked = []
    monkeypatch.setattr(RequestLog, "end", lambda self, req, slots: asked.append(slots.tolist()))
    of_release.skip_construction(monkeypatch)
    allocator = SimpleNamespace(get_kvcache=lambda: SimpleNamespace(memory=None))
    group = None if rank is None else object()
    cache = FreeKVRadixCache(SimpleNamespace(tp_cache_group=group, token_to_kv_pool_allocator=allocator))
    cache.req_to_token_pool = SimpleNamespace(req_to_token=torch.arange(20).view(2, 10))
    of_release.let_go(cache, of_release.request(1, finished=lambda: has_finished), 3, monkeypatch)
    assert asked == ([[10, 11, 12]] if has_finished and rank != 1 else [])
