"""Requests as the `openai` client makes them."""

from __future__ import annotations

from openai import OpenAI

from tools.servers import Server

PROMPT = "Once upon a time there was a page that nobody had read for a long while."
MESSAGES = [
    {"role": "system", "content": "You answer at length."},
    {"role": "user", "content": PROMPT},
]
# Of log-probabilities in float32, in nats. The same sums in another order differ in the last digits; a page that is
# missing or doubled moves the logits of the tests' model, whose deviation is 4, by far more.
LOGPROB_TOLERANCE = 1e-3


def client(server: Server, **options) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **options)


def chat(openai: OpenAI, max_tokens: int = 64, **options):
    """Ask greedily, by default for `MESSAGES`; with an `AsyncOpenAI`, an awaitable."""
    options = {"messages": MESSAGES, "temperature": 0, **options}
    return openai.chat.completions.create(model="m", max_tokens=max_tokens, **options)


def complete(openai: OpenAI, max_tokens: int = 64, **options):
    """Complete greedily, by default `PROMPT`; with an `AsyncOpenAI`, an awaitable."""
    options = {"prompt": PROMPT, "temperature": 0, **options}
    return openai.completions.create(model="m", max_tokens=max_tokens, **options)
