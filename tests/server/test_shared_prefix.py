"""Requests over one prefix share its pages, on the host and on the device."""

from __future__ import annotations

import random

import pytest

from tools.servers import Server, random_prompt

NUM_REQUESTS, PREFIX_TOKENS, NUM_STEPS = 16, 4096, 64
PAGE_TOKENS = 32


@pytest.fixture
def prefix(narrow: Server, rng: random.Random) -> list[int]:
    """The prefix is in the tree, and most of its blocks have gone to other prompts since."""
    prefix = random_prompt(rng, PREFIX_TOKENS)
    narrow.generate_one(prefix, 1)
    evict_blocks(narrow, rng)
    return prefix


def evict_blocks(narrow: Server, rng: random.Random) -> None:
    """Send prompts that take the device blocks: together they are longer than those hold (8,192 tokens)."""
    for _ in range(2):
        narrow.generate_one(random_prompt(rng, 4500), 1)


def fetches(before: dict[str, int], after: dict[str, int]) -> int:
    return (after["recalled_bytes"] - before["recalled_bytes"]) // after["block_bytes"]


def test_sixteen_requests_hold_the_pages_of_their_prefix_once(narrow: Server, prefix: list[int], rng: random.Random):
    tails = [random_prompt(rng, 16 + i) for i in range(NUM_REQUESTS)]
    before = narrow.freekv()
    assert before["host_tokens"] < NUM_REQUESTS * PREFIX_TOKENS, "without sharing, they would fit as well"
    replies = narrow.generate([prefix + tail for tail in tails], NUM_STEPS).body
    after = narrow.freekv()
    assert [reply["meta_info"]["cached_tokens"] for reply in replies] == [PREFIX_TOKENS] * NUM_REQUESTS
    assert f"#running-req: {NUM_REQUESTS}," in narrow.log.read_text(), "they did not run at the same time"
    # A finished request leaves whole pages; its last token has no KV.
    own_tokens = sum((len(tail) + NUM_STEPS - 1) // PAGE_TOKENS * PAGE_TOKENS for tail in tails)
    assert after["tree_tokens"] - before["tree_tokens"] == own_tokens
    assert after["tree_evicted_tokens"] == before["tree_evicted_tokens"]


def test_sixteen_requests_fetch_a_page_once_for_all(narrow: Server, prefix: list[int], rng: random.Random):
    prompt = prefix + random_prompt(rng, 20)
    alone = narrow.generate_one(prompt, NUM_STEPS)
    evict_blocks(narrow, rng)
    start = narrow.freekv()
    together = narrow.generate([prompt] * NUM_REQUESTS, NUM_STEPS).body
    end = narrow.freekv()
    assert [reply["output_ids"] for reply in together] == [alone] * NUM_REQUESTS
    misses_of_one = (end["misses"] - start["misses"]) / NUM_REQUESTS
    assert 0 < fetches(start, end) < 2 * misses_of_one, "each misses the pages, and they are copied once"
