"""The `openai` client sees the same answers from FreeKV and from plain SGLang."""

from __future__ import annotations

import asyncio
import json
import random
import string
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI

from tests.support.openai_requests import LOGPROB_TOLERANCE, MESSAGES, PROMPT, chat, client, complete
from tools.servers import Server

PAGE_TOKENS = 32
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "known": {"type": "boolean"}},
    "required": ["name", "known"],
}


@pytest.fixture
def both(exact: Server, plain: Server) -> Callable[[Callable[[OpenAI], Any]], tuple[Any, Any]]:
    """Ask FreeKV and plain SGLang the same thing."""
    return lambda ask: (ask(client(exact)), ask(client(plain)))


def random_text(rng: random.Random, num_tokens: int) -> str:
    """A token is a byte."""
    return "".join(rng.choices(string.ascii_lowercase + " ", k=num_tokens))


def test_chat(both):
    freekv, plain = both(lambda openai: chat(openai))
    assert freekv.choices[0].message.content == plain.choices[0].message.content
    assert freekv.choices[0].finish_reason == plain.choices[0].finish_reason == "length"
    assert freekv.usage.completion_tokens == 64


def test_a_conversation(both):
    def talk(openai: OpenAI) -> list[dict]:
        messages = list(MESSAGES)
        for turn in range(3):
            answer = chat(openai, 32, messages=messages).choices[0].message.content
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"{turn} more?"}]
        return messages

    freekv, plain = both(talk)
    assert freekv == plain


def test_completion_token_ids(both):
    freekv, plain = both(lambda openai: complete(openai, extra_body={"return_token_ids": True}).choices[0])
    assert len(freekv.token_ids) == 64
    assert freekv.token_ids == plain.token_ids


@pytest.mark.parametrize("num_choices", [2, 5])
def test_choices_of_two_prompts(both, num_choices: int):
    prompts = [PROMPT, PROMPT[::-1]]
    freekv, plain = both(lambda openai: complete(openai, prompt=prompts, n=num_choices))
    texts = [choice.text for choice in freekv.choices]
    assert [choice.index for choice in freekv.choices] == list(range(2 * num_choices))
    assert texts == [choice.text for choice in plain.choices]
    assert texts == [text for text in texts[::num_choices] for _ in range(num_choices)]
    assert texts[0] != texts[-1]
    assert freekv.usage.completion_tokens == 2 * num_choices * 64


def test_choices_of_a_chat_share_their_prompt(exact: Server, rng: random.Random):
    """Ten choices over a prompt that takes a quarter of the store."""
    before = exact.freekv()
    prompt = random_text(rng, before["host_tokens"] // 4)
    answer = chat(client(exact), 16, messages=[{"role": "user", "content": prompt}], n=10, temperature=1.0)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1, "sampled choices differ"
    after = exact.freekv()
    assert len(prompt) <= after["tree_tokens"] < len(prompt) + 11 * PAGE_TOKENS, "a page at most for each choice"
    assert after["tree_evicted_tokens"] == before["tree_evicted_tokens"]


@pytest.mark.parametrize("ask", [chat, complete])
def test_stop_strings(both, ask: Callable):
    def text(answer) -> str:
        return answer.text if ask is complete else answer.message.content

    whole = text(both(lambda openai: ask(openai).choices[0])[1])
    late, early = whole[50:53], whole[30:33]
    freekv, plain = both(lambda openai: ask(openai, stop=[late, early]).choices[0])
    assert freekv.finish_reason == plain.finish_reason == "stop"
    assert freekv.matched_stop == plain.matched_stop
    assert text(freekv) == text(plain) == whole[: min(whole.index(late), whole.index(early))]


def test_logprobs_of_a_completion(both):
    freekv, plain = both(lambda openai: complete(openai, logprobs=3).choices[0].logprobs)
    assert freekv.tokens == plain.tokens
    assert freekv.token_logprobs == pytest.approx(plain.token_logprobs, abs=LOGPROB_TOLERANCE)
    assert [set(top) for top in freekv.top_logprobs] == [set(top) for top in plain.top_logprobs]


def test_logprobs_of_a_prompt(both, rng: random.Random):
    """Of several prefill chunks."""
    prompt = random_text(rng, 600)
    freekv, plain = both(lambda openai: complete(openai, 4, prompt=prompt, echo=True, logprobs=1).choices[0])
    assert freekv.text == plain.text
    assert freekv.text.startswith(prompt)
    assert len(freekv.logprobs.tokens) == len(prompt) + 4
    assert freekv.logprobs.token_logprobs[1:] == pytest.approx(plain.logprobs.token_logprobs[1:], abs=LOGPROB_TOLERANCE)


def test_logprobs_of_a_chat(both):
    freekv, plain = both(lambda openai: chat(openai, logprobs=True, top_logprobs=2).choices[0].logprobs.content)
    assert [token.token for token in freekv] == [token.token for token in plain]
    for ours, theirs in zip(freekv, plain, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=LOGPROB_TOLERANCE)
        assert [top.token for top in ours.top_logprobs] == [top.token for top in theirs.top_logprobs]


@pytest.mark.parametrize(
    "options",
    [{"frequency_penalty": 1.5}, {"logit_bias": {str(ord("e") - ord("!")): 5}}],  # of the token "e"
    ids=str,
)
def test_sampling_options(both, options: dict):
    freekv, plain = both(lambda openai: complete(openai, **options).choices[0].text)
    assert freekv == plain


def test_a_json_schema(both):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    freekv, plain = both(lambda openai: chat(openai, 128, response_format=form).choices[0].message.content)
    assert freekv == plain
    assert isinstance(json.loads(freekv)["known"], bool)


def test_a_chat_that_may_call_tools(both):
    tools = [{"type": "function", "function": {"name": "say", "description": "Say it.", "parameters": SCHEMA}}]
    freekv, plain = both(lambda openai: chat(openai, tools=tools, tool_choice="auto"))
    assert freekv.choices[0].message == plain.choices[0].message
    assert freekv.usage.prompt_tokens == plain.usage.prompt_tokens


def test_usage_tells_what_was_cached(exact: Server, rng: random.Random):
    prompt, pages = random_text(rng, 100), 3 * PAGE_TOKENS
    usages = [complete(client(exact), 8, prompt=prompt).usage for _ in range(2)]
    assert [usage.prompt_tokens for usage in usages] == [100, 100]
    assert [usage.total_tokens for usage in usages] == [108, 108]
    details = [usage.prompt_tokens_details for usage in usages]
    assert details[0] is None or details[0].cached_tokens == 0  # releases of SGLang say "nothing" in either way
    assert details[1].cached_tokens == pages


def test_many_requests_at_once(exact: Server, plain: Server, rng: random.Random):
    """Chats and completions of different lengths, whole and streamed, side by side."""
    texts = [random_text(rng, rng.randrange(1, 200)) for _ in range(12)]

    async def ask(openai: AsyncOpenAI, number: int, text: str) -> str:
        if number % 3 == 0:
            return (await complete(openai, 16 + number, prompt=text)).choices[0].text
        messages = [{"role": "user", "content": text}]
        if number % 3 == 1:
            return (await chat(openai, 16 + number, messages=messages)).choices[0].message.content
        stream = await chat(openai, 16 + number, messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all(server: Server) -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as openai:
            return await asyncio.gather(*(ask(openai, number, text) for number, text in enumerate(texts)))

    freekv = asyncio.run(ask_all(exact))
    assert [len(text) for text in freekv] == [16 + number for number in range(12)]
    assert freekv == asyncio.run(ask_all(plain))


def test_a_prompt_that_does_not_fit_is_a_bad_request(exact: Server, rng: random.Random):
    num_tokens = exact.freekv()["host_tokens"] + 1
    with pytest.raises(BadRequestError, match=f"{num_tokens} tokens"):
        complete(client(exact), prompt=random_text(rng, num_tokens))
