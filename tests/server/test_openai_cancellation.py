"""A client of the `openai` package that goes away takes its requests with it, and nobody else's."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from openai import APITimeoutError

from tests.support.openai_requests import chat, client, complete
from tools.servers import Server, assert_pages_are_whole, random_prompt

MAX_TOKENS = 3000  # takes longer than a client here waits, and SGLang's two seconds between hearing and ending
UNENDING = {"extra_body": {"ignore_eos": True}}


def hang_up(streams: list, num_chunks: int = 3) -> None:
    for stream in streams:
        for _ in range(num_chunks):
            next(stream)
        stream.close()


@pytest.mark.parametrize("ask", [chat, complete])
def test_a_closed_stream_ends_its_requests(exact: Server, ask: Callable):
    start = exact.freekv()["decoded_tokens"]
    one = ask(client(exact), MAX_TOKENS, stream=True, **UNENDING)
    three = ask(client(exact), MAX_TOKENS // 4, stream=True, n=3, **UNENDING)
    hang_up([one, three])
    assert_pages_are_whole(exact)
    assert exact.freekv()["decoded_tokens"] - start < MAX_TOKENS


def test_a_client_that_waits_no_longer_ends_its_request(exact: Server):
    start = exact.freekv()["decoded_tokens"]
    with pytest.raises(APITimeoutError):
        complete(client(exact, timeout=1), MAX_TOKENS, **UNENDING)
    assert_pages_are_whole(exact)
    assert exact.freekv()["decoded_tokens"] - start < MAX_TOKENS


def test_hanging_up_beyond_the_budget_changes_nothing_for_the_others(narrow: Server, rng: random.Random):
    shared = random_prompt(rng, 600)
    prompts = [shared + random_prompt(rng, 100) for _ in range(6)]
    staying, leaving = prompts[:2], prompts[2:]
    alone = narrow.generate_all(staying, 96)
    narrow.flush()
    streams = [complete(client(narrow), MAX_TOKENS, prompt=ids, stream=True, **UNENDING) for ids in leaving]
    for stream in streams:
        next(stream)
    hang_up(streams)
    assert narrow.generate_all(staying, 96) == alone
    narrow.flush()  # once the server is idle: it has let everything go
    state = narrow.freekv()
    assert state["tree_tokens"] == state["tree_protected_tokens"] == 0
