"""A request may ask for its own budget, within the width of a window."""

from __future__ import annotations

import random

import pytest

from tools.servers import Server, random_prompt

NUM_STEPS = 24


@pytest.fixture
def prompt(rng: random.Random) -> list[int]:
    """Longer than the default budget of `narrow` (128 tokens), within the full width (256) to the last step."""
    return random_prompt(rng, 256 - NUM_STEPS)


def test_the_default_budget_selects_and_the_full_width_is_exact(
    narrow: Server, plain: Server, prompt: list[int], full_width: dict
):
    expected = plain.generate_one(prompt, NUM_STEPS)
    assert narrow.generate_one(prompt, NUM_STEPS) != expected
    narrow.flush()  # what the first request decoded is not what the second would
    before = narrow.freekv()
    assert narrow.generate_one(prompt, NUM_STEPS, **full_width) == expected
    assert narrow.freekv()["rows"] == before["rows"], "a request within its budget has nothing to select"


def test_requests_of_different_budgets_share_a_batch(
    narrow: Server, plain: Server, prompt: list[int], full_width: dict
):
    budgets = [{}, full_width, {}, full_width]
    alone = [narrow.generate_one(prompt, NUM_STEPS, **budget) for budget in budgets[:2]]
    narrow.flush()
    params = [{"temperature": 0, "max_new_tokens": NUM_STEPS, "ignore_eos": True, **budget} for budget in budgets]
    together = narrow.request("/generate", {"input_ids": [prompt] * 4, "sampling_params": params}).body
    assert [reply["output_ids"] for reply in together] == 2 * alone


REFUSED = {
    "not a multiple of the page size": 100,
    "more than the width": 288,
    "less than sink and recent": 32,
    "negative": -128,
    "a word": "many",
    "nothing": None,
}
ENDPOINTS = {
    "/generate": lambda params: {"text": "hi", "sampling_params": {"max_new_tokens": 2, **params}},
    "/v1/completions": lambda params: {"model": "m", "prompt": "hi", "max_tokens": 2, **params},
    "/v1/chat/completions": lambda params: {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
        **params,
    },
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_budget_that_does_not_fit_is_refused_with_a_sentence(narrow: Server, endpoint: str):
    for budget in REFUSED.values():
        reply = narrow.request(endpoint, ENDPOINTS[endpoint]({"custom_params": {"freekv_budget": budget}}))
        assert reply.status == 400
        message = reply.body.get("error", reply.body)["message"]
        assert repr(budget) in message
        assert "a multiple of 32, at least 64 (sink + recent), at most 256 (--freekv-max-budget)" in message
    accepted = narrow.request(endpoint, ENDPOINTS[endpoint]({"custom_params": {"freekv_budget": 256}}))
    assert accepted.status == 200


def test_a_misspelt_parameter_is_refused_and_a_foreign_one_is_not(narrow: Server):
    misspelt = narrow.generate([1, 2, 3], 2, custom_params={"freekv_budgets": 128})
    assert misspelt.status == 400
    assert "freekv_budgets" in misspelt.body["error"]["message"]
    assert narrow.generate([1, 2, 3], 2, custom_params={"another": 1}).status == 200
