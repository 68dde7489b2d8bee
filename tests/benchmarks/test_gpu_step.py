"""The step on a card is what is counted: launches of the engine, traffic of the records, bytes of the index."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.cost_model import gpu_table
from benchmarks.cost_model.cards import A100, CARDS, H100, H200, card_named
from benchmarks.cost_model.gpu_step import full_attention, gpu_step, under, window_only
from benchmarks.cost_model.launches import COSINE, GATE, KERNEL_S, Launches, fixed_seconds
from benchmarks.cost_model.model import Model
from benchmarks.cost_model.step_time import Setting, logits_seconds
from benchmarks.cost_model.traffic import Traffic, measured_traffic
from sglang_freekv.algorithm.inputs import DecodeInput
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from tests.support.random_traces import make_trace
from tests.support.recorded_streams import RecordedStreams
from tests.support.simulated_requests import PAGE, SimulatedEngine

K = 1024
LLAMA, CONFIG = Model.load("llama-3.1-8b"), FreeKVConfig()
QUIET = Traffic(turnover=0.0, flagged_share=0.0, exposed_share=0.0)


def step(card=H200, batch=8, context=32 * K, traffic=None, **config):
    setting = Setting(context, batch, replace(CONFIG, **config))
    return gpu_step(card, LLAMA, under(traffic or measured_traffic(), setting, LLAMA))


def launched_by_a_layer(monkeypatch: pytest.MonkeyPatch, **rule: object) -> tuple[list[str], list[str]]:
    """What a layer in a graph launches in front of attention, and on other streams."""
    streams = RecordedStreams(monkeypatch)
    geometry = Geometry(2, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, key_bits=2)
    config = FreeKVConfig(
        budget_tokens=4 * PAGE, sink_tokens=PAGE, recent_tokens=PAGE, arena_tokens=4 * PAGE, key_bits=2, **rule
    )
    engine = SimulatedEngine(geometry, config, max_requests=2)
    streams.watch(engine)
    engine.prefill_whole(engine.start(make_trace(geometry, 20 * PAGE, seed=1), 19 * PAGE))
    zeros = torch.zeros(2, dtype=torch.int64)
    engine.decoder.plan(DecodeInput(zeros, zeros + 1, zeros, engine.req_to_token, [], []), in_graph=True)
    before = len(streams.launches)
    qkv = (torch.randn(2, n, geometry.head_dim) for n in (4, 2, 2))
    engine.decoder.run(0, *qkv, engine.scale)
    launches = streams.launches[before:]
    on_main = [one.name for one in launches if one.stream is streams.main]
    assert on_main[-1] == "attend"
    return on_main[:-1], [one.name for one in launches if one.stream is not streams.main]


@pytest.mark.parametrize(
    ("counted", "rule"),
    [
        (GATE, {}),
        (GATE.with_candidates(), {"candidates": 2}),
        (COSINE, {"selector": "codes", "tau": 0.9}),
    ],
    ids=["gate", "two levels", "cosine"],
)
def test_a_layer_launches_what_is_counted(counted: Launches, rule: dict, monkeypatch):
    front, beside = launched_by_a_layer(monkeypatch, **rule)
    assert front == [*counted.front]
    assert beside == [*counted.scan, *counted.fetch]


def test_one_launch_less_is_a_launch_faster():
    without = GATE._replace(front=tuple(op for op in GATE.front if op != "correct_windows"))
    assert fixed_seconds(GATE) - fixed_seconds(without) == pytest.approx(KERNEL_S)


class TestTraffic:
    def test_it_is_what_the_records_of_the_default_rule_say(self):
        found = measured_traffic()
        assert 0 < found.flagged_share < 0.3 and 0 < found.turnover < 0.2 and 0 < found.exposed_share < 1
        assert 0 < measured_traffic(source="intervals_8k_long").scored_share < 1 == found.scored_share

    def test_a_long_answer_returns_to_pages_and_a_short_one_starts_with_empty_blocks(self):
        long, short = (measured_traffic(source=source) for source in ("rules_long", "rules_4k"))
        assert long.missed_share < 0.6 < 1 < short.missed_share

    def test_a_method_that_was_not_measured_is_refused(self):
        with pytest.raises(ValueError, match=r"rules_8k_long.jsonl has no traffic of 'best' at 7872 tokens"):
            measured_traffic("best")

    def test_blocks_for_two_windows_hold_an_eighth_of_32k_tokens(self):
        setting = under(measured_traffic(), Setting(32 * K, 8, CONFIG), LLAMA)
        traffic = measured_traffic()
        entering = traffic.turnover * (2 * K - 256) * 128 * K
        assert setting.recalled_bytes == pytest.approx(entering * traffic.missed_share * 7 / 8)


class TestStep:
    def test_within_the_budget_a_step_is_the_same_with_and_without_retrieval(self):
        setting = Setting(2 * K, 8, CONFIG)
        assert gpu_step(H200, LLAMA, setting) == gpu_step(H200, LLAMA, replace(setting, config=None))

    def test_window_only_reads_the_budget_and_full_attention_everything(self):
        setting = Setting(32 * K, 8, CONFIG)
        less, more = (gpu_step(H200, LLAMA, f(setting)).seconds for f in (window_only, full_attention))
        assert more - less == pytest.approx(8 * 30 * K * 128 * K / H200.memory_rate)

    def test_parts_add_up_where_the_link_has_time(self):
        own, ideal = step(), gpu_step(H200, LLAMA, Setting(2 * K, 8)).seconds
        parts = own.launches + own.scan + own.correction + own.exposed_link
        assert own.seconds == pytest.approx(ideal + parts) and min(own.launches, own.scan, own.exposed_link) > 0

    def test_what_is_waited_for_is_the_exposed_share_over_the_link(self):
        some, none = (step(traffic=replace(measured_traffic(), exposed_share=share)) for share in (0.5, 0.0))
        assert some.seconds - none.seconds == pytest.approx(some.exposed_link) == pytest.approx(some.link / 2)
        assert none.exposed_link == 0 and none.link == some.link

    def test_recalls_of_the_last_layer_run_beside_the_logits(self):
        assert step().tail == 0
        flood = step(batch=32, traffic=Traffic(turnover=0.5, flagged_share=0.0, exposed_share=0.0))
        assert flood.tail > 0
        assert flood.tail == pytest.approx(flood.beside / 32 - logits_seconds(LLAMA, H200.memory_rate))

    def test_a_scan_grows_with_pages_and_rows_and_a_first_level_bounds_it(self):
        assert step(context=64 * K).scan == pytest.approx(2 * step().scan) == pytest.approx(step(batch=16).scan)
        assert step(context=128 * K, candidates=5).scan < step(context=128 * K).scan / 5

    def test_rows_that_are_not_due_are_not_scanned_where_they_may_wait(self):
        some = replace(QUIET, scored_share=0.25)
        assert step(traffic=some, score_interval=8).scan == pytest.approx(step(traffic=QUIET).scan / 4)
        assert step(traffic=some).scan == step(traffic=QUIET).scan

    def test_a_cosine_scans_flagged_rows_in_front_and_all_rows_beside(self):
        traffic = Traffic(turnover=0.0, flagged_share=0.25, exposed_share=0.0)
        gate, cosine = step(traffic=traffic), step(traffic=traffic, selector="codes", tau=0.9)
        assert cosine.scan == pytest.approx(gate.scan / 4)
        assert gate.beside_memory == 0 < cosine.beside_memory

    def test_more_rows_than_run_at_once_take_further_turns(self):
        few, many = step(traffic=QUIET), step(batch=64, traffic=QUIET)
        assert many.correction == 2 * few.correction

    def test_a_card_without_conversions_of_pairs_is_bound_by_its_instructions(self):
        assert step(A100).scan > 3 * step(H100).scan


def test_cards_are_known_by_what_devices_call_themselves():
    assert card_named("NVIDIA H100 80GB HBM3") is H100
    assert card_named("NVIDIA A100-SXM4-80GB") is A100
    assert card_named("Tesla T4") is None
    for card in CARDS.values():  # so the clock is the one of the matrix rate
        per_clock = {80: 2048, 89: 512, 90: 4096}[card.capability]
        assert card.tflops * 1e3 == pytest.approx(card.num_sms * card.clock_ghz * per_clock, rel=0.01)


class TestTables:
    def test_every_card_and_cell_has_its_steps_and_what_they_are_made_of(self):
        header, *lines = gpu_table.TABLES["gpu-step"]().lines
        assert len(lines) == 3 * len(gpu_table.CELLS)
        assert {"window only ms", "full ms", "FreeKV ms", "scan ms", "exposed link ms"} <= set(header)

    def test_the_three_goals_are_judged_by_each_record(self):
        _, *lines = gpu_table.TABLES["gpu-goals"]().lines
        assert len(lines) == 3 * len(gpu_table.SOURCES) - 3 and {line[-1] for line in lines} <= {"met", "MISSED"}
        assert {line[2] for line in lines} == {"at most 1.1", "at least 3.5", "at least 1.6"}

    def test_what_is_exposed_less_is_faster_in_every_cell(self):
        lines = {line[0]: line[1:] for line in gpu_table.TABLES["gpu-what-if"]().lines}
        default, none = lines["the default"], lines["no recall exposed"]
        assert all(float(a.split(",")[0]) > float(b.split(",")[0]) for a, b in zip(default, none, strict=True))
