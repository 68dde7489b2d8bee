"""A server with each baseline by its flag: chunks, prefix hits and budgets of requests, audited after every batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sglang_freekv.algorithm.selectors import SELECTORS
from tools.servers import random_prompt, serve

NUM_STEPS = 70  # opens two pages
FLAGS = (
    *("--dtype", "float32", "--chunked-prefill-size", "256", "--kv-retrieval", "freekv", "--freekv-audit"),
    *("--freekv-budget", "128", "--freekv-max-budget", "256", "--freekv-sink", "32", "--freekv-recent", "32"),
    *("--freekv-host-memory", "0.05", "--freekv-device-blocks-memory", "0.0235"),
)


# One for each way of choosing; the other two are like these, and in `tests/algorithm` as all are.
@pytest.mark.parametrize("name", ["one-time", "r-kv", "arkvale"])
def test_a_server_selects_by_the_baseline_that_its_flag_names(
    name: str, model: Path, tmp_path: Path, rng: random.Random
):
    prompts = [random_prompt(rng, num_tokens) for num_tokens in (600, 90, 20)]
    with serve(model, tmp_path / "log", *FLAGS, "--freekv-selector", name) as server:
        outputs = server.generate_all(prompts, NUM_STEPS)
        turns = [prompt + output + prompts[2] for prompt, output in zip(prompts, outputs, strict=True)]
        outputs += server.generate_all(turns, NUM_STEPS, custom_params={"freekv_budget": 160})
        state = server.freekv()
    assert [len(output) for output in outputs] == [NUM_STEPS] * 6
    assert state["rows"] > 0 and state["absent_pages"] == 0
    assert (state["baseline"], state["config"]["freekv_selector"]) == (SELECTORS[name].baseline, name)
    assert f"selects by a baseline, for comparison: {SELECTORS[name].baseline}" in server.log.read_text()
