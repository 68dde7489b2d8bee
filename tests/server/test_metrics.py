"""What a running server tells: /metrics, /server_info and the decode log line agree."""

from __future__ import annotations

import json
import random
import re

import pytest

from benchmarks import footprint
from sglang_freekv.doctor.forecast import Machine, forecast, resolve
from sglang_freekv.operations.__main__ import FOLDER
from sglang_freekv.serving.metrics_catalog import METRICS, published_name
from tests.server.conftest import FLAGS
from tools.servers import Server, random_prompt

NUM_STEPS = 64
LOG_INTERVAL = 10  # decode steps between two reports
COUNTERS = {name for name, metric in METRICS.items() if metric.kind == "counter"}


def decode_past_the_device_blocks(narrow: Server, rng: random.Random) -> None:
    """Three prompts that do not fit the device blocks together, decoded in one batch."""
    narrow.generate_all([random_prompt(rng, 4000 + 32 * i) for i in range(3)], NUM_STEPS)


def test_counters_grow_with_the_recalls_and_no_page_is_absent(narrow: Server, rng: random.Random):
    before = narrow.metrics()
    decode_past_the_device_blocks(narrow, rng)
    after = narrow.metrics()
    grown = {name: after[published_name(name)] - before[published_name(name)] for name in COUNTERS}
    assert grown["recalled_bytes"] > 0
    assert grown["misses"] > 0
    assert grown["hits"] > grown["misses"]
    assert 0 < grown["flagged_rows"] < grown["rows"]
    assert grown["absent_pages"] == grown["audit_failures"] == 0
    assert grown["recalled_bytes"] == (grown["misses"] + grown["demand_misses"]) * narrow.freekv()["block_bytes"]
    # Each chunk of 256 tokens lays out all that comes before it; a prompt that waits may be cut into smaller ones.
    filled = sum(sum(range(256, length, 256)) for length in (4000, 4032, 4064))
    filled *= narrow.freekv()["full_kv_bytes_per_token"]
    assert filled <= grown["arena_filled_bytes"] < 2 * filled


def test_the_host_holds_what_full_attention_holds_and_the_device_two_windows(narrow: Server, rng: random.Random):
    before = narrow.freekv()
    narrow.generate_one(random_prompt(rng, 3000), NUM_STEPS)
    after = narrow.freekv()
    grown = {name: after[name] - before[name] for name in footprint.COUNTERS}
    full = sum(range(3000 + 1, 3000 + NUM_STEPS))  # the first token comes with the prompt
    index = (after["page_summaries_bytes"] / after["host_tokens"]) / after["full_kv_bytes_per_token"]
    assert grown["host_token_steps"] == full
    assert footprint.footprint(grown).device == pytest.approx(2 * 128 * (NUM_STEPS - 1) / full + index, rel=0.01)


def test_metrics_equal_what_server_info_says(narrow: Server, rng: random.Random):
    decode_past_the_device_blocks(narrow, rng)
    narrow.flush()
    # A report is due every ten steps, and none is after the last. The last ten stay on one page and within the budget
    # of 128 tokens, so that no row is flagged and no block is looked for in them.
    num_steps = 120
    narrow.generate_one([1, 2, 3], num_steps)
    published, state = narrow.metrics(), narrow.freekv()
    of_every_step = {"steps", "decoded_tokens", "hits", "device_token_steps", "host_token_steps"}
    for name in COUNTERS - of_every_step:
        assert published[published_name(name)] == state[name], name
    lag = {name: int(state[name] - published[published_name(name)]) for name in of_every_step}
    assert all(0 <= lag[name] < LOG_INTERVAL for name in ("steps", "decoded_tokens"))
    assert 0 <= lag["hits"] < state["hits"] / 10
    end = 3 + num_steps  # tokens after the last step, which computes all but the one that it generates
    assert lag["host_token_steps"] == sum(range(end - lag["steps"], end))
    assert lag["host_token_steps"] <= lag["device_token_steps"] <= 2 * lag["host_token_steps"]  # in whole pages
    used, free = (published[published_name(f"host_pages_{which}")] for which in ("used", "free"))
    assert used > 0
    assert 32 * (used + free) == state["host_tokens"]
    assert 0 <= published[published_name("host_pages_evictable")] <= used
    assert 0 < published[published_name("device_blocks_used")] <= state["device_blocks"]
    assert published[published_name("device_blocks_total")] == state["device_blocks"]
    assert published[published_name("max_running_requests")] == state["max_running_requests"]


def test_everything_that_dashboard_and_alerts_ask_for_is_published(narrow: Server, rng: random.Random):
    decode_past_the_device_blocks(narrow, rng)
    files = [(FOLDER / name).read_text() for name in ("grafana_dashboard.json", "alert_rules.yml")]
    asked = set(re.findall(r"sglang:\w+", " ".join(files)))
    assert len(asked) > len(METRICS)
    assert asked <= set(narrow.metrics())


def test_rules_can_join_our_metrics_with_those_of_sglang(narrow: Server):
    """PromQL matches samples by their labels."""
    narrow.generate_one([1, 2, 3], 2)
    text = narrow.request("/metrics").body
    names = ("sglang:num_running_reqs", "sglang:num_queue_reqs", published_name("max_running_requests"))
    first, *others = (re.findall(rf"^{name}{{(.*)}} ", text, re.MULTILINE) for name in names)
    assert len(first) == 1
    assert others == [first, first]


def test_server_info_shows_the_settings_as_resolved(narrow: Server):
    state = json.loads(json.dumps(narrow.freekv()))
    config, plan = state["config"], state["memory_plan"]
    assert (config["freekv_budget"], config["freekv_max_budget"], config["page_size"]) == (128, 256, 32)
    assert (config["freekv_selector"], config["freekv_gate"], config["freekv_audit"]) == ("mass", 0.02, False)
    assert 0.04 < config["freekv_host_memory"] == plan["host_bytes"] / 2**30 <= 0.05
    assert 0.02 < config["freekv_device_blocks_memory"] <= 0.0235
    assert plan["num_tokens"] == state["host_tokens"]
    assert plan["max_requests"] == state["max_running_requests"]


def test_the_doctor_foretells_the_plan_of_the_server(narrow: Server):
    model = narrow.request("/server_info").body["model_path"]
    server_args, config = resolve(["--model-path", model, "--max-running-requests", "64", *FLAGS["narrow"]], Machine())
    plan = narrow.freekv()["memory_plan"]
    assert forecast(server_args, config, Machine()).plan.report()["memory_plan"] == plan


def test_the_decode_log_has_one_freekv_part(narrow: Server, rng: random.Random):
    decode_past_the_device_blocks(narrow, rng)
    lines = [line for line in narrow.log.read_text().splitlines() if "Decode batch" in line]
    last = re.findall(r"freekv: (\d+) blocks used, ([\d.]+) [KMG]iB recalled, .* (\d+) absent", lines[-1])
    assert len(last) == 1
    blocks_used, recalled, absent = last[0]
    assert 0 < int(blocks_used) <= narrow.freekv()["device_blocks"]
    assert float(recalled) > 0
    assert int(absent) == 0


def test_each_request_beyond_its_budget_leaves_a_line_in_the_log(narrow: Server, rng: random.Random):
    start = len(narrow.log.read_text())
    decode_past_the_device_blocks(narrow, rng)
    narrow.generate_one([1, 2, 3], NUM_STEPS)
    line = r"FreeKV request: ([\d,]+) \+ (\d+) .* attended to (\d+) .*; (\d+)% .*"
    lines = re.findall(line, narrow.log.read_text()[start:])
    assert sorted(int(prompt.replace(",", "")) for prompt, *_ in lines) == [4000, 4032, 4064]
    assert {(int(new), int(attended)) for _, new, attended, _ in lines} == {(NUM_STEPS, 128)}
    assert all(0 < int(share) < 100 for *_, share in lines)
