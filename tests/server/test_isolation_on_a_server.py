"""A request is answered as on a fresh server: on pages and blocks of others, beside others, and under salts.

SGLang does not start with LoRA where there is no GPU; what keeps adapters apart is asked of its requests.
"""

from __future__ import annotations

import random
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from tools.servers import Server, assert_pages_are_whole, random_prompt

PAGE_TOKENS, NUM_STEPS = 32, 16
_ROUNDING = 1e-3  # nats in float32; a value of somebody else's moves them by far more


class Said(NamedTuple):
    """What a request was answered."""

    tokens: list[int]
    logprobs: list[float]

    def __eq__(self, other: object) -> bool:
        return self.tokens == other.tokens and self.logprobs == pytest.approx(other.logprobs, abs=_ROUNDING)


def ask(server: Server, prompt: list[int], num_steps: int = NUM_STEPS, **fields) -> dict:
    params = {"temperature": 0, "max_new_tokens": num_steps, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True, **fields}
    reply = server.request("/generate", body)
    assert reply.status == 200, reply
    return reply.body


def said(reply: dict) -> Said:
    return Said(reply["output_ids"], [logprob for logprob, *_ in reply["meta_info"]["output_token_logprobs"]])


def cached(reply: dict) -> int:
    return reply["meta_info"]["cached_tokens"]


_RNG = random.Random("isolation")
PROMPTS = [random_prompt(_RNG, n) for n in (40, 100, 300, 1200)]  # within the narrow budget, and over it


@pytest.fixture(params=["exact", "narrow"])
def server(request: pytest.FixtureRequest) -> Server:
    """With an empty prefix cache."""
    return request.getfixturevalue(request.param)


def answers(server: Server) -> list[Said]:
    return [said(ask(server, prompt)) for prompt in PROMPTS]


def intrude(server: Server, rng: random.Random) -> None:
    """Fill every page, and by that every block, with others' values."""
    store = server.freekv()["host_tokens"]
    length = min(4000, store - 128)
    for _ in range(store // length + 1):
        ask(server, random_prompt(rng, length), 1)


def test_on_pages_of_others_the_answer_is_that_of_an_empty_store(server: Server, rng: random.Random):
    alone = answers(server)
    evicted = server.freekv()["tree_evicted_tokens"]
    intrude(server, rng)
    assert server.freekv()["tree_evicted_tokens"] > evicted
    assert answers(server) == alone  # pages of the tree are evicted for it
    intrude(server, rng)
    server.flush()
    assert answers(server) == alone  # all pages are free, with what was left in them


def test_beside_others_the_answer_is_that_of_a_request_alone(server: Server, rng: random.Random):
    alone = answers(server)
    server.flush()
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(ask, server, random_prompt(rng, 500), 64) for _ in range(3)]
        replies = list(pool.map(lambda prompt: ask(server, prompt), PROMPTS))
        assert all(other.result() for other in others)
    assert [said(reply) for reply in replies] == alone
    assert_pages_are_whole(server)


def test_a_prefix_is_found_under_its_own_salt_only(server: Server):
    prompt = PROMPTS[2]
    known, alone = len(prompt) // PAGE_TOKENS * PAGE_TOKENS, said(ask(server, prompt))
    server.flush()
    salts = ("mine", None, "yours", "min", "mine ")
    for salt in salts:
        first, second = (ask(server, prompt, extra_key=salt) for _ in range(2))
        assert (cached(first), cached(second)) == (0, known), salt
        assert [said(first), said(second)] == [alone] * 2
    assert server.freekv()["tree_tokens"] >= len(salts) * known, "salts share pages"


def test_an_empty_salt_is_what_it_is_for_plain_sglang(server: Server, plain: Server):
    """Another one than none, or, with the tree in Rust, none."""
    prompt = random_prompt(random.Random("empty salt"), 300)

    def is_found(of: Server) -> list[bool]:
        of.flush()
        return [cached(ask(of, prompt, extra_key=salt)) > 0 for salt in (None, "", "", None)]

    found = is_found(server)
    assert found == is_found(plain)
    assert not found[0] and found[2] and found[3]


def test_the_salt_of_the_openai_api_separates_as_well(server: Server):
    prompt = random_prompt(random.Random("salt"), 200)

    def cached_tokens(**salt: str) -> int:
        reply = server.request("/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 4, **salt})
        details = reply.body["usage"]["prompt_tokens_details"]
        return details["cached_tokens"] if details else 0

    salts = [{"cache_salt": "a"}, {"cache_salt": "b"}, {}, {"cache_salt": "a"}, {"cache_salt": "b"}, {}]
    assert [cached_tokens(**salt) for salt in salts] == [0, 0, 0, 192, 192, 192]


def test_an_adapter_is_part_of_the_key_under_which_a_prefix_is_found():
    """The tree keeps keys apart, which `tools/fuzz` checks for many of them."""

    def key(salt: str | None, adapter: str | None) -> str | None:
        return Req("0", "", array("q", [1]), SamplingParams(), extra_key=salt, lora_id=adapter).extra_key

    keys = [key(salt, adapter) for salt in (None, "salt") for adapter in (None, "first", "second")]
    assert len(set(keys)) == len(keys)
