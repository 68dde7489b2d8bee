"""The order on the streams, on stand-ins for CUDA's: who waits for whom, and who does not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from sglang_freekv.algorithm.inputs import DecodeInput, ExtendInput
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from tests.support.random_traces import make_trace
from tests.support.recorded_streams import TABLE_OPS, Launch, RecordedStreams
from tests.support.simulated_requests import PAGE, SimulatedEngine

NUM_LAYERS = 3
GEOMETRY = Geometry(NUM_LAYERS, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, key_bits=2)
CONFIG = FreeKVConfig(budget_tokens=4 * PAGE, sink_tokens=PAGE, recent_tokens=PAGE, arena_tokens=4 * PAGE)
RULES = {
    "gate": {},
    "budgets-by-mass": {"mass": 0.7},
    "cosine": {"selector": "codes", "tau": 0.9},
    "cosine-in-two-levels": {"selector": "mass", "tau": 0.9, "candidates": 2, "hysteresis": 0.05},
}
SELECT = ("correct_windows", "select_pages")  # what writes windows
SCAN = ("list_candidates", "score_pages", "share_pages", "apportion_pages", "select_pages")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> RecordedStreams:
    return RecordedStreams(monkeypatch)


@pytest.fixture(params=RULES.values(), ids=RULES)
def engine(streams: RecordedStreams, request: pytest.FixtureRequest) -> SimulatedEngine:
    """An engine on recorded streams, with a request over its budget."""
    return start(streams, **request.param)


def start(streams: RecordedStreams, **rule: object) -> SimulatedEngine:
    engine = SimulatedEngine(GEOMETRY, replace(CONFIG, **rule), max_requests=2)
    streams.watch(engine)
    prompt = 9 * PAGE
    engine.prefill_whole(engine.start(make_trace(GEOMETRY, prompt + 40, seed=1), prompt))
    return engine


def decode(engine: SimulatedEngine, streams: RecordedStreams) -> list[Launch]:
    """What one step launches, from its plan on."""
    before = len(streams.launches)
    engine.decode()
    return streams.launches[before:]


def run_layers(engine: SimulatedEngine, num_layers: int = NUM_LAYERS) -> None:
    """The first layers of the planned step, which is left unfinished."""
    g, size = engine.geometry, len(engine.decoder.last_plan.batch.rows)
    for layer in range(num_layers):
        qkv = (torch.randn(size, n, g.head_dim) for n in (g.num_qo_heads, g.num_kv_heads, g.num_kv_heads))
        engine.decoder.run(layer, *qkv, engine.scale)


def plan_warm_up(engine: SimulatedEngine) -> None:
    """A step of padding alone, as SGLang captures it."""
    zeros = torch.zeros(2, dtype=torch.int64)
    engine.decoder.plan(DecodeInput(zeros, zeros + 1, zeros, engine.req_to_token, [], []), in_graph=True)


def beside(launches: list[Launch], streams: RecordedStreams, *names: str) -> list[Launch]:
    return [one for one in launches if one.name in names and one.stream is not streams.main]


def of_layer(launches: list[Launch], layer: int) -> list[Launch]:
    return [one for one in launches if one.layer == layer]


def test_what_follows_the_last_layer_runs_beside_its_recall_and_finish_waits_for_everything(
    engine: SimulatedEngine, streams: RecordedStreams
) -> None:
    engine.plan_decode(engine.requests)
    run_layers(engine)
    logits = streams.launch("logits")
    recall = of_layer(beside(streams.launches, streams, *TABLE_OPS), NUM_LAYERS - 1)[-1]
    assert not logits.follows(recall) and not recall.follows(logits)
    engine.decoder.finish()
    assert streams.launch("sampling").follows_everything


def test_a_chunk_is_written_through_beside_what_follows_its_last_layer(streams: RecordedStreams) -> None:
    engine = SimulatedEngine(GEOMETRY, CONFIG, max_requests=2)
    streams.watch(engine)
    finish, followers = engine.prefiller.finish, []

    def compute_logits_and_finish() -> None:
        followers.append(streams.launch("logits"))
        finish()
        followers.append(streams.launch("sampling"))

    engine.prefiller.finish = compute_logits_and_finish
    engine.prefill_whole(engine.start(make_trace(GEOMETRY, 6 * PAGE, seed=2), 5 * PAGE))
    logits, sampling = followers
    last = of_layer(beside(streams.launches, streams, "store_pages", *TABLE_OPS), NUM_LAYERS - 1)
    assert "store_pages" in {one.name for one in last}
    assert not any(logits.follows(one) for one in last)
    assert sampling.follows_everything


def test_what_is_launched_beside_a_layer_waits_for_its_token_its_corrected_window_and_its_front(
    engine: SimulatedEngine, streams: RecordedStreams
) -> None:
    launches = decode(engine, streams)
    for one in beside(launches, streams, *SCAN, *TABLE_OPS):
        own = of_layer(launches, one.layer)
        before = {other.name for other in own if one.follows(other) and other.stream is streams.main}
        assert "append_tokens" in before
        assert before & set(SELECT)
        if one.name in (*TABLE_OPS, "share_pages"):
            # A claim beside the front's could take what attention reads; shares read the block of the latest page.
            assert before & set(TABLE_OPS)
        if one.name in TABLE_OPS:
            assert all(one.follows(other) for other in own if other.name in SELECT)


def test_a_layers_tables_and_what_layers_share_are_used_by_one_op_at_a_time(
    engine: SimulatedEngine, streams: RecordedStreams
) -> None:
    launches = decode(engine, streams) + decode(engine, streams)
    tables = [one for one in launches if one.name in TABLE_OPS]
    in_turn = [of_layer(tables, layer) for layer in range(NUM_LAYERS)]
    in_turn.append(beside(tables, streams, *TABLE_OPS))  # the list of the back half's misses
    for is_beside in (False, True):  # workspaces of scores, of either half
        in_turn.append([one for one in launches if one.name in SCAN and (one.stream is streams.main) != is_beside])
    for ops in in_turn:
        assert all(later.follows(earlier) for earlier, later in itertools.pairwise(ops))
    assert all(map(len, in_turn[:-1]))


def test_beside_a_cosine_the_next_layer_is_scanned_while_the_link_is_busy(streams: RecordedStreams) -> None:
    launches = decode(start(streams, **RULES["cosine"]), streams)
    for layer in range(NUM_LAYERS - 1):
        recalls = of_layer(beside(launches, streams, *TABLE_OPS), layer)
        scans = of_layer(beside(launches, streams, *SCAN), layer + 1)
        assert recalls and scans
        assert not any(scan.follows(recall) for scan in scans for recall in recalls)


def test_with_a_gate_nothing_but_the_fetch_runs_beside_attention(streams: RecordedStreams) -> None:
    launches = decode(start(streams), streams)
    assert {one.stream for one in launches} == {streams.main, beside(launches, streams, *TABLE_OPS)[0].stream}
    assert not beside(launches, streams, *SCAN)
    for layer in range(NUM_LAYERS):
        attend = next(one for one in of_layer(launches, layer) if one.name == "attend")
        assert not any(attend.follows(one) for one in of_layer(beside(launches, streams, *TABLE_OPS), layer))


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("at", [SELECT, TABLE_OPS, ("attend",)], ids=["selecting", "fetching", "attending"])
def test_a_step_that_fails_leaves_nothing_beside_the_next(
    engine: SimulatedEngine, streams: RecordedStreams, phase: str, at: tuple[str, ...]
) -> None:
    engine.plan_decode(engine.requests)
    run_layers(engine, 1)
    with streams.failing_at(*at), pytest.raises(RuntimeError, match="planted"):
        run_layers(engine, 2)
    failed = len(streams.launches)
    if phase == "decode":
        engine.plan_decode(engine.requests)
    else:
        rows, slots = torch.tensor([2]), 20 * PAGE + torch.arange(PAGE)
        engine.prefiller.plan(ExtendInput(rows, slots, engine.req_to_token, [2], [0], [PAGE], [False]))
    streams.launch("embedding")
    assert streams.launches[failed].follows_everything


def test_a_warm_up_and_the_capture_after_it_join_their_forks_and_wait_for_no_other(
    engine: SimulatedEngine, streams: RecordedStreams
) -> None:
    """One plan, two runs, and a third that is captured, as by SGLang."""
    plan_warm_up(engine)
    for _ in range(2):
        run_layers(engine)
        engine.decoder.finish()
        assert streams.launch("logits").follows_everything
    with streams.capture():
        run_layers(engine)
        streams.launch("logits")
        engine.decoder.finish()
    with pytest.raises(RuntimeError, match="unjoined"), streams.capture():
        run_layers(engine)
    plan_warm_up(engine)
    with streams.capture():  # nothing was forked in it, so nothing is waited for
        engine.decoder.finish()
        engine.decoder.finish()
