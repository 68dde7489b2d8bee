"""Requests that must be refused with HTTP 4xx, and what of SGLang itself answers them otherwise, or ends of them.

A test sends all of them to FreeKV, and to plain SGLang those that it survives; a soak mixes some into its traffic.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
_JSON = "application/json"


@dataclass(frozen=True)
class WrongRequest:
    """A body that no server should answer with 200."""

    name: str
    path: str
    body: bytes
    content_type: str = _JSON


def _post(name: str, path: str, body: Any, content_type: str = _JSON) -> WrongRequest:
    return WrongRequest(
        f"{path} {name}", path, body if isinstance(body, bytes) else json.dumps(body).encode(), content_type
    )


def generate(**fields: Any) -> dict:
    """A right body for /generate, with some fields changed."""
    return {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2, "temperature": 0}} | fields


def complete(**fields: Any) -> dict:
    """A right body for /v1/completions, with some fields changed."""
    return {"model": "m", "prompt": "hi", "max_tokens": 2} | fields


def chat(**fields: Any) -> dict:
    """A right body for /v1/chat/completions, with some fields changed."""
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | fields


def _sampling(**params: Any) -> dict:
    return generate(sampling_params={"max_new_tokens": 2, **params})


_RIGHT = {GENERATE: generate, COMPLETIONS: complete, CHAT: chat}
_NOT_JSON = {
    "nothing": b"",
    "half a body": b'{"input_ids": [1, 2',
    "no JSON": b"input_ids=1&max_new_tokens=2",
    "bytes that are no text": b"\xff\xfe\x00\x80" * 100,
    "a null": b"null",
    "a number": b"17",
    "a list": b"[1, 2, 3]",
    "a text": b'"hello"',
    "a lone surrogate": b'{"text": "\\ud800"}',
    "lists in lists": b"[" * 5000 + b"]" * 5000,
    "objects in objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "zeros": b"0" * (1 << 20),
}
_BUDGETS = {
    "a word": "many",
    "text of a number": "128",
    "a fraction": 128.5,
    "a whole fraction": 128.0,
    "true": True,
    "null": None,
    "zero": 0,
    "negative": -128,
    "no whole page": 100,
    "more than the width": 1 << 20,
    "64 bits": (1 << 63) - 1,
    "unsigned 64 bits": (1 << 64) - 1,
    "a list": [128],
    "an object": {"tokens": 128},
    "a megabyte": "x" * (1 << 20),
    "deep": json.loads("[" * 200 + "]" * 200),
}
# Ours: SGLang hands them on, or dies of them.
_CUSTOM_PARAMS = {
    **{f"budget is {name}": {"freekv_budget": budget} for name, budget in _BUDGETS.items()},
    "are misspelt": {"freekv_budgets": 128},
    "are a list": [128],
    "are a number": 7,
    "are a text": "freekv_budget",
    "are true": True,
    "nest lists": {"another": [[1]]},
    "nest objects": {"another": {"a": {"b": 1}}},
    "nest an object in a list": {"another": [{"a": 1}]},
    "nest deeply": {"another": json.loads("[" * 200 + "]" * 200)},
}
CUSTOM_PARAMS = [
    *(_post(f"custom_params {name}", GENERATE, _sampling(custom_params=p)) for name, p in _CUSTOM_PARAMS.items()),
    *(
        _post(f"custom_params {name}", path, _RIGHT[path](custom_params=p))
        for name, p in _CUSTOM_PARAMS.items()
        for path in (COMPLETIONS, CHAT)
    ),
]
_BODIES = [
    *(_post(name, path, body) for name, body in _NOT_JSON.items() for path in _RIGHT),
    *(
        _post("as a form", path, right(), "application/x-www-form-urlencoded")
        for path, right in _RIGHT.items()
        if path != GENERATE
    ),
    _post("without a prompt", GENERATE, {"sampling_params": {"max_new_tokens": 2}}),
    _post("with an empty prompt", GENERATE, generate(input_ids=[])),
    _post("with a token beyond the vocabulary", GENERATE, generate(input_ids=[1, 1 << 20])),
    _post("with a token beyond 64 bits", GENERATE, generate(input_ids=[1 << 70])),
    _post("with a negative token", GENERATE, generate(input_ids=[-1])),
    _post("with tokens of text", GENERATE, generate(input_ids=["a", "b"])),
    _post("with a text that is a number", GENERATE, {"text": 5}),
    _post("with sampling_params of text", GENERATE, generate(sampling_params="greedy")),
    _post("with a stream that is none", GENERATE, generate(stream={})),
    _post("for minus one token", GENERATE, _sampling(max_new_tokens=-1)),
    _post("with a temperature of -1", GENERATE, _sampling(temperature=-1)),
    _post("with a top_p of 2", GENERATE, _sampling(top_p=2)),
    _post("with NaN", GENERATE, b'{"text": "hi", "sampling_params": {"temperature": NaN}}'),
    _post("with 10**400", GENERATE, b'{"text": "hi", "sampling_params": {"max_new_tokens": 1' + b"0" * 400 + b"}}"),
    _post("without a prompt", COMPLETIONS, {"model": "m"}),
    _post("with a token beyond the vocabulary", COMPLETIONS, complete(prompt=[1, 1 << 20])),
    _post("with a prompt that is an object", COMPLETIONS, complete(prompt={"a": 1})),
    _post("with max_tokens of text", COMPLETIONS, complete(max_tokens="two")),
    _post("for minus one token", COMPLETIONS, complete(max_tokens=-1)),
    _post("with a temperature of text", COMPLETIONS, complete(temperature="hot")),
    _post("with a top_p of 2", COMPLETIONS, complete(top_p=2)),
    _post("without messages", CHAT, {"model": "m"}),
    _post("with no messages", CHAT, chat(messages=[])),
    _post("with a message of an unknown role", CHAT, chat(messages=[{"role": "", "content": 1}])),
    _post("with messages of text", CHAT, chat(messages="hi")),
    _post("with max_tokens of text", CHAT, chat(max_tokens="two")),
    _post("with a temperature of -1", CHAT, chat(temperature=-1)),
]
# SGLang's scheduler, or what reads its answers, ends of these on a plain server.
_FATAL_FIELDS = {
    "a host for disaggregated prefill": {"bootstrap_host": "2.2.2.2"},
    "embeddings in JSON": {"positional_embed_overrides": {"embeds": [[1.0]], "positions": [0]}},
    "embeddings of text": {"positional_embed_overrides": "x"},
    "a list as session": {"session_params": {"id": ["a"]}},
    "two salts": {"extra_key": ["a", "b"]},
    "labels that no metric has": {"custom_labels": {"a": "b"}},
    "a million top log-probabilities": {"return_logprob": True, "top_logprobs_num": 1_000_000},
    "log-probabilities from before the prompt": {"return_logprob": True, "logprob_start_len": -5},
}
_FATAL_SAMPLING = {
    "a bias of text": {"logit_bias": {"5": "x"}},
    "a bias of null": {"logit_bias": {"5": None}},
    "a list of biases": {"logit_bias": [1]},
    "a JSON schema that is an object": {"json_schema": {"type": "object"}},
    "a top_k beyond 32 bits": {"top_k": 1 << 40},
    "a top_k beyond 64 bits": {"top_k": 1 << 70},
    "half a token more": {"max_new_tokens": 1.5},
    "a switch of text": {"skip_special_tokens": "x"},
}
_LONG = [token % 250 for token in range(600)]  # more than a chunk of the test servers
FATAL = [
    *(_post(f"with {name}", GENERATE, generate(input_ids=_LONG, **field)) for name, field in _FATAL_FIELDS.items()),
    *(_post(f"with {name}", GENERATE, _sampling(**param)) for name, param in _FATAL_SAMPLING.items()),
    _post("with a host for disaggregated prefill", COMPLETIONS, complete(bootstrap_host="2.2.2.2")),
    _post("with a host for disaggregated prefill", CHAT, chat(bootstrap_host="2.2.2.2")),
    *(_post("without a recorder", f"/{action}_expert_distribution_record", {}) for action in ("start", "stop", "dump")),
]
# A validator of SGLang's fails on these: HTTP 500.
_SGLANGS_OWN = {f"{CHAT} {name}" for name in ("a null", "a number", "a list", "a text")}
SGLANGS_OWN = [request for request in _BODIES if request.name in _SGLANGS_OWN]
WRONG = [*CUSTOM_PARAMS, *FATAL, *(request for request in _BODIES if request.name not in _SGLANGS_OWN)]
