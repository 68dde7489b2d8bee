"""Clients of a server: they send one action of the traffic, end it as it says, and judge the answer."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import closing
from http import HTTPStatus
from typing import NamedTuple

from tools.servers import Reply, Server
from tools.soak.traffic import Action, Job
from tools.soak.wrong_requests import COMPLETIONS, GENERATE, WrongRequest

_ANSWER_SECONDS = 300
_LEAVE_SECONDS = 0.2  # that a client waits before it leaves without an answer


class Outcome(NamedTuple):
    """What became of an action."""

    kind: str
    ended: str  # length, abort, hung_up, left, refused, flushed or busy
    is_compared: bool = False  # with its reference, and equal to it
    cached_tokens: int = 0
    retractions: int = 0


def play(server: Server, action: Action) -> Outcome:
    """Send an action and wait for its end.

    Raises
    ------
    AssertionError
        If the server answers otherwise than it should, with 5xx in particular.
    """
    if action == "flush":
        return Outcome("flush", _flush(server))
    if isinstance(action, WrongRequest):
        reply = post(server, action)
        assert_refused(action.name, reply)
        return Outcome("wrong", "refused")
    if action.kind == "oversize":
        reply = server.request(GENERATE, _body(action))
        assert_refused("a prompt longer than the host store", reply)
        return Outcome(action.kind, "refused")
    if action.ending == "leave":
        return Outcome(action.kind, _leave(server, action))
    return {"stream": _stream, "whole": _whole, "openai": _openai}[action.surface](server, action)


def post(server: Server, request: WrongRequest, timeout_s: float = 60) -> Reply:
    """POST a body as it is."""
    headers = {"Content-Type": request.content_type}
    message = urllib.request.Request(server.url + request.path, request.body, headers, method="POST")
    try:
        with urllib.request.urlopen(message, timeout=timeout_s) as answer:
            return Reply(answer.status, answer.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        return Reply(error.code, error.read().decode(errors="replace"))


def assert_refused(name: str, reply: Reply) -> None:
    """It was answered with 4xx and with words, and nothing of the server's inside is shown."""
    text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
    assert HTTPStatus.BAD_REQUEST <= reply.status < HTTPStatus.INTERNAL_SERVER_ERROR, (name, reply.status, text[:500])
    assert text.strip(), name
    assert "Traceback" not in text and 'File "' not in text, (name, text[:500])


def _flush(server: Server) -> str:
    """Ask for an empty cache in the midst of traffic: SGLang refuses while requests run."""
    status = server.request("/flush_cache", {}).status
    assert status in (HTTPStatus.OK, HTTPStatus.BAD_REQUEST), status
    return "flushed" if status == HTTPStatus.OK else "busy"


def _params(job: Job) -> dict:
    return {"temperature": 0, "ignore_eos": True, "custom_params": {"freekv_budget": job.budget}}


def _body(job: Job, **fields: object) -> dict:
    params = {**_params(job), "max_new_tokens": job.max_new_tokens}
    return {"input_ids": job.prompt, "sampling_params": params, **fields}


def _whole(server: Server, job: Job) -> Outcome:
    reply = server.request(GENERATE, _body(job), _ANSWER_SECONDS)
    assert reply.status == HTTPStatus.OK, (job.kind, reply)
    return _judge(job, reply.body)


def _openai(server: Server, job: Job) -> Outcome:
    body = {"model": "m", "prompt": job.prompt, "max_tokens": job.max_new_tokens, **_params(job)}
    reply = server.request(COMPLETIONS, body, _ANSWER_SECONDS)
    assert reply.status == HTTPStatus.OK, (job.kind, reply)
    choice = reply.body["choices"][0]
    assert choice["finish_reason"] == "length", choice
    if job.reference:
        assert choice["text"] == job.reference.text(job.max_new_tokens), job
    return Outcome(job.kind, "length", is_compared=job.reference is not None)


def _stream(server: Server, job: Job) -> Outcome:
    last, rid = {}, uuid.uuid4().hex
    with closing(_answers(server, _body(job, rid=rid, stream=True))) as answers:
        for num_read, answer in enumerate(answers):
            assert "error" not in answer, (job.kind, answer)
            last = answer
            if num_read == job.patience and job.ending == "abort":
                server.request("/abort_request", {"rid": rid})
            if num_read == job.patience and job.ending == "hang up":
                return Outcome(job.kind, "hung_up")
    return _judge(job, last)


def _answers(server: Server, body: dict) -> Iterator[dict]:
    """Answers of a stream as they arrive, the first of them, empty, before it has been scheduled."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + GENERATE, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as response:
        yield {}
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


def _leave(server: Server, job: Job) -> str:
    """Close the connection while the server works on a whole answer."""
    try:
        reply = server.request(GENERATE, _body(job), _LEAVE_SECONDS)
    except (TimeoutError, urllib.error.URLError) as error:
        if isinstance(getattr(error, "reason", error), TimeoutError):  # wrapped where it ends the sending
            return "left"
        raise
    assert reply.status == HTTPStatus.OK, reply
    return "length"


def _judge(job: Job, answer: dict) -> Outcome:
    """Judge the last answer of a request."""
    meta = answer["meta_info"]
    ended = meta["finish_reason"]["type"]
    assert ended == "length" or (ended == "abort" and job.ending == "abort"), (job.kind, meta)
    if ended == "length":
        assert len(answer["output_ids"]) == job.max_new_tokens, (job.kind, meta)
    if job.reference:
        expected = job.reference.output[: job.max_new_tokens]
        assert answer["output_ids"] == expected, f"{answer['output_ids']} instead of {expected}: {job}"
    # An aborted request's lacks some numbers.
    cached_tokens, retractions = (meta.get(name, 0) for name in ("cached_tokens", "num_retractions"))
    return Outcome(job.kind, ended, job.reference is not None, cached_tokens, retractions)
