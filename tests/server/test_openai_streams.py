"""What the `openai` client reads from a stream is what it gets as a whole, and what plain SGLang streams."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import pytest
from openai import OpenAI

from tests.support.openai_requests import LOGPROB_TOLERANCE, chat, client, complete
from tools.servers import Server


def read_chat(stream: Iterable) -> dict[int, str]:
    """Text by choice."""
    texts: dict[int, str] = defaultdict(str)
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    return texts


def read_completion(stream: Iterable) -> dict[int, str]:
    """Text by choice."""
    texts: dict[int, str] = defaultdict(str)
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    return texts


STREAMS = {"chat": (chat, read_chat), "completion": (complete, read_completion)}
streams = pytest.mark.parametrize(("ask", "read"), STREAMS.values(), ids=STREAMS)


@streams
def test_a_stream_is_the_whole_answer(exact: Server, plain: Server, ask: Callable, read: Callable):
    chunks = list(ask(client(exact), stream=True))
    assert len(chunks) > 10
    assert len(read(chunks)[0]) == 64
    assert read(chunks) == read(ask(client(plain), stream=True))
    answer = ask(client(exact)).choices[0]
    assert read(chunks)[0] == (answer.text if ask is complete else answer.message.content)


@streams
def test_choices_come_interleaved(exact: Server, plain: Server, ask: Callable, read: Callable):
    chunks = list(ask(client(exact), n=3, stream=True))
    indices = [choice.index for chunk in chunks for choice in chunk.choices]
    assert indices != sorted(indices)
    assert read(chunks) == read(ask(client(plain), n=3, stream=True))
    assert set(read(chunks)) == {0, 1, 2}


@streams
def test_nothing_of_a_stop_string_is_streamed(exact: Server, plain: Server, ask: Callable, read: Callable):
    whole = read(ask(client(plain), stream=True))[0]
    stop = whole[30:36]
    chunks = list(ask(client(exact), stop=stop, stream=True))
    assert read(chunks)[0] == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


@streams
def test_usage_ends_a_stream(exact: Server, plain: Server, ask: Callable, read: Callable):
    def usage(openai: OpenAI) -> tuple[int, int]:
        *chunks, last = ask(openai, n=2, stream=True, stream_options={"include_usage": True})
        assert all(chunk.usage is None for chunk in chunks)
        assert last.choices == []
        return last.usage.prompt_tokens, last.usage.completion_tokens

    assert usage(client(exact)) == usage(client(plain))
    assert usage(client(exact))[1] == 2 * 64


def test_streamed_logprobs_are_those_of_the_whole_answer(exact: Server):
    chunks = complete(client(exact), logprobs=2, stream=True)
    parts = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
    whole = complete(client(exact), logprobs=2).choices[0].logprobs
    assert [token for part in parts for token in part.tokens] == whole.tokens
    # The second request finds the first one's prompt in the cache: other sums, the same numbers.
    assert [logprob for part in parts for logprob in part.token_logprobs] == pytest.approx(
        whole.token_logprobs, abs=LOGPROB_TOLERANCE
    )
