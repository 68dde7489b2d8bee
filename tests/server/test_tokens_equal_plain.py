"""Greedy tokens of FreeKV are those of plain SGLang wherever the budget covers the request."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tools.servers import Server, random_prompt

NUM_STEPS = 64


@dataclass(frozen=True)
class Covered:
    """A server, and the parameters with which its budget covers every prompt of these tests."""

    server: Server
    params: dict

    def outputs(self, prompts: list[list[int]], num_steps: int = NUM_STEPS) -> list[list[int]]:
        return self.server.generate_all(prompts, num_steps, **self.params)


@pytest.fixture(params=["exact", "narrow"])
def covered(request: pytest.FixtureRequest) -> Covered:
    """With overlap scheduling, and without it on a server whose default budget is smaller."""
    server = request.getfixturevalue(request.param)
    return Covered(server, request.getfixturevalue("full_width") if request.param == "narrow" else {})


def test_a_single_request(covered: Covered, plain: Server, rng: random.Random):
    prompt = random_prompt(rng, 190)
    assert covered.outputs([prompt]) == plain.generate_all([prompt], NUM_STEPS)


def test_a_ragged_batch_of_eight(covered: Covered, plain: Server, rng: random.Random):
    prompts = [random_prompt(rng, num_tokens) for num_tokens in (1, 31, 32, 33, 63, 65, 127, 192)]
    assert covered.outputs(prompts) == plain.generate_all(prompts, NUM_STEPS)


def test_each_turn_of_a_conversation_extends_the_one_before(covered: Covered, plain: Server, rng: random.Random):
    prompt, cached_tokens = random_prompt(rng, 40), []
    for _ in range(2):
        reply = covered.server.generate(prompt, NUM_STEPS, **covered.params)
        assert reply.body["output_ids"] == plain.generate_one(prompt, NUM_STEPS)
        cached_tokens.append(reply.body["meta_info"]["cached_tokens"])
        prompt = prompt + reply.body["output_ids"] + random_prompt(rng, 20)
    # Of the first turn's 104 tokens the last has no KV yet, and only whole pages are shared.
    assert cached_tokens == [0, 96]


def test_a_prompt_of_many_chunks_joins_running_requests(exact: Server, plain: Server, rng: random.Random):
    short, long = [random_prompt(rng, n) for n in (1, 100, 250)], random_prompt(rng, 1500)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(exact.generate_all, short, 3 * NUM_STEPS)
        exact.wait_for_decoding(3)
        joined = exact.generate(long, NUM_STEPS)
        assert not running.done()
    assert joined.body["output_ids"] == plain.generate_one(long, NUM_STEPS)
    assert running.result() == plain.generate_all(short, 3 * NUM_STEPS)


def test_after_retraction(exact: Server, plain: Server, rng: random.Random):
    prompts = [random_prompt(rng, 400) for _ in range(8)]
    num_steps = 3 * NUM_STEPS  # 8 * (400 + 192) tokens are more than the store has
    # SGLang may expect these to end early; of requests that ignore their end it may expect all that they ask for.
    ending = {"ignore_eos": False, "min_new_tokens": num_steps}
    replies = exact.generate(prompts, num_steps, **ending).body
    assert sum(reply["meta_info"]["num_retractions"] for reply in replies) > 0
    assert [reply["output_ids"] for reply in replies] == plain.generate_all(prompts, num_steps, **ending)
