"""What a running server tells: /metrics, /server_info and the decode log line agree."""

from __future__ import annotations

import random
import re

from servers import Server, random_prompt
from sglang_freekv.metrics import METRICS

NUM_STEPS = 64
COUNTERS = {name for name, (kind, _) in METRICS.items() if kind == "counter"}


def decode_past_the_device_blocks(narrow: Server, rng: random.Random) -> None:
    """Three prompts that do not fit the device blocks together, decoded in one batch."""
    narrow.generate_all([random_prompt(rng, 4000 + 32 * i) for i in range(3)], NUM_STEPS)


def test_counters_grow_with_the_recalls_and_no_page_is_absent(narrow: Server, rng: random.Random):
    before = narrow.metrics()
    decode_past_the_device_blocks(narrow, rng)
    after = narrow.metrics()
    grown = {name: after[f"sglang:freekv_{name}_total"] - before[f"sglang:freekv_{name}_total"] for name in COUNTERS}
    assert grown["recalled_bytes"] > 0
    assert grown["misses"] > 0
    assert grown["hits"] > grown["misses"]
    assert 0 < grown["flagged_rows"] < grown["rows"]
    assert grown["absent_pages"] == 0
    assert grown["recalled_bytes"] == (grown["misses"] + grown["demand_misses"]) * narrow.freekv()["block_bytes"]


def test_metrics_equal_what_server_info_says(narrow: Server, rng: random.Random):
    decode_past_the_device_blocks(narrow, rng)
    narrow.flush()
    narrow.generate_one([1, 2, 3], 2 * NUM_STEPS)  # a report is due every ten steps, and none is after the last
    published, state = narrow.metrics(), narrow.freekv()
    for name in COUNTERS:
        assert published[f"sglang:freekv_{name}_total"] == state[name]
    pages = published["sglang:freekv_host_pages_used"], published["sglang:freekv_host_pages_free"]
    assert pages[0] > 0
    assert 32 * sum(pages) == state["host_tokens"]
    assert 0 < published["sglang:freekv_device_blocks_used"] <= state["device_blocks"]


def test_the_decode_log_has_one_freekv_part(narrow: Server, rng: random.Random):
    decode_past_the_device_blocks(narrow, rng)
    lines = [line for line in narrow.log.read_text().splitlines() if "Decode batch" in line]
    last = re.findall(r"freekv: (\d+) blocks used, ([\d.]+) MiB recalled, .* (\d+) absent", lines[-1])
    assert len(last) == 1
    blocks_used, mib_recalled, absent = last[0]
    assert 0 < int(blocks_used) <= narrow.freekv()["device_blocks"]
    assert float(mib_recalled) > 0
    assert int(absent) == 0
