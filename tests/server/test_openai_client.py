"""The `openai` client sees the same answers from FreeKV and from plain SGLang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from openai import OpenAI

from servers import Server, assert_pages_are_whole

PROMPT = "Once upon a time there was a page that nobody had read for a long while."
MESSAGES = [
    {"role": "system", "content": "You answer at length."},
    {"role": "user", "content": PROMPT},
]


def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def both(exact: Server, plain: Server) -> Callable[[Callable[[OpenAI], Any]], tuple[Any, Any]]:
    """Ask FreeKV and plain SGLang the same thing."""
    return lambda ask: (ask(client(exact)), ask(client(plain)))


def chat(openai: OpenAI, max_tokens: int = 64, **options):
    return openai.chat.completions.create(model="m", messages=MESSAGES, temperature=0, max_tokens=max_tokens, **options)


def complete(openai: OpenAI, max_tokens: int = 64, **options):
    return openai.completions.create(model="m", prompt=PROMPT, temperature=0, max_tokens=max_tokens, **options)


def test_chat(both):
    freekv, plain = both(lambda openai: chat(openai))
    assert freekv.choices[0].message.content == plain.choices[0].message.content
    assert freekv.usage.completion_tokens == 64


def test_streamed_chat_is_the_whole_chat(both):
    def join(openai):
        parts = [chunk.choices[0].delta.content or "" for chunk in chat(openai, stream=True)]
        assert len(parts) > 10
        return "".join(parts)

    freekv, plain = both(join)
    assert freekv == plain
    assert freekv == both(lambda openai: chat(openai).choices[0].message.content)[0]


def test_streamed_completion(both):
    def join(openai):
        return [chunk.choices[0].text for chunk in complete(openai, stream=True)]

    freekv, plain = both(join)
    assert "".join(freekv) == "".join(plain)


def test_two_choices_of_one_prompt(both):
    freekv, plain = both(lambda openai: [choice.text for choice in complete(openai, n=2).choices])
    assert len(freekv) == 2
    assert freekv == plain


def test_stop_string(both):
    whole = both(lambda openai: complete(openai).choices[0].text)[1]
    stop = whole[30:33]
    freekv, plain = both(lambda openai: complete(openai, stop=stop).choices[0])
    assert freekv.finish_reason == "stop"
    assert freekv.text == plain.text == whole[: whole.index(stop)]


def test_logprobs(both):
    freekv, plain = both(lambda openai: complete(openai, logprobs=3).choices[0].logprobs)
    assert freekv.tokens == plain.tokens
    assert freekv.token_logprobs == pytest.approx(plain.token_logprobs, abs=1e-3)
    assert [set(top) for top in freekv.top_logprobs] == [set(top) for top in plain.top_logprobs]


def test_a_stream_closed_by_the_client_ends_its_request(exact: Server):
    max_tokens = 3000
    start = exact.freekv()["decoded_tokens"]
    streams = [chat(client(exact), max_tokens, stream=True, extra_body={"ignore_eos": True}) for _ in range(3)]
    for stream in streams:
        for _ in range(3):
            next(stream)
        stream.close()
    assert_pages_are_whole(exact)
    assert exact.freekv()["decoded_tokens"] - start < max_tokens
