"""A host store that is too small: refused with a number, or waited for; never lost."""

from __future__ import annotations

import random

from tools.servers import Server, assert_pages_are_whole, random_prompt


def test_a_request_longer_than_the_store_is_refused_with_the_tokens_that_fit(exact: Server, rng: random.Random):
    too_long = exact.freekv()["host_tokens"] + 1
    reply = exact.generate(random_prompt(rng, too_long))
    assert reply.status == 400
    message = reply.body["error"]["message"]
    assert f"({too_long} tokens)" in message
    fits = int(message.split("maximum allowed length (")[1].split(" tokens")[0]) - 1
    assert len(exact.generate_one(random_prompt(rng, fits), 1)) == 1
    assert exact.generate(random_prompt(rng, fits + 1), 1).status == 400


def test_requests_that_do_not_fit_together_wait_or_are_retracted(exact: Server, rng: random.Random):
    prompts = [random_prompt(rng, rng.randrange(600, 1200)) for _ in range(12)]
    assert sum(map(len, prompts)) > 2 * exact.freekv()["host_tokens"]
    hurried = exact.generate_all(prompts, 32)
    unhurried = []
    for prompt in prompts:
        exact.flush()
        unhurried.append(exact.generate_one(prompt, 32))
    assert hurried == unhurried
    assert_pages_are_whole(exact)


def test_a_budget_below_the_length_gives_the_same_tokens_to_requests_that_wait(narrow: Server, rng: random.Random):
    """Twice as many requests as may run at the same time."""
    prompts = [random_prompt(rng, rng.randrange(100, 700)) for _ in range(2 * narrow.freekv()["max_running_requests"])]
    hurried = narrow.generate_all(prompts, 24)
    narrow.flush()
    assert hurried == [narrow.generate_one(prompt, 24) for prompt in prompts]
