"""A randomized run of requests of every kind against one audited server, on scarce host pages and device blocks.

    python tests/server/oracles/audit_run.py --requests 500 --seed 1

Prompts have 1 to 8,192 tokens, log-uniform; half of them share a prefix with others. Requests end by length, by
/abort_request or by a client that hangs up; running ones are retracted for want of host pages; the cache is flushed
between rounds. `run` raises unless the server is whole afterwards and has answered as it does when it has time.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from servers import Server, serve
from sglang_freekv.tiny_model import TinyModel

MODEL = TinyModel(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, dtype="float32")
MAX_PROMPT_TOKENS = 8192
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}
# Requests are admitted as if they stopped at once. They do not, and some are retracted.
HASTE = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "1"}

_BUDGETS = (96, 128, 160)  # tokens; far below most prompts
_HOST_TOKENS = 8448  # one request of the largest kind and a few small ones
_BLOCKS_GIB = 0.005  # the windows of 16 requests, and half of what the host store holds
FLAGS = (
    "--kv-retrieval freekv --dtype float32 --freekv-audit --chunked-prefill-size 1024 --freekv-arena 2048 "
    f"--max-total-tokens {_HOST_TOKENS} --freekv-budget {_BUDGETS[0]} --freekv-max-budget {_BUDGETS[-1]} "
    f"--freekv-sink 32 --freekv-recent 32 --freekv-device-blocks-memory {_BLOCKS_GIB}"
).split()

_CLIENTS = 24
_MAX_NEW_TOKENS = 256
_REQUESTS_PER_ROUND = 100  # then the cache is flushed
_NUM_COMPARED = 20
_ERROR = re.compile(r"Traceback|\w+Error\b|leak|Exception|CRITICAL|out of memory", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """One request and how it ends."""

    prompt: list[int]
    max_new_tokens: int
    budget: int  # tokens
    ending: Literal["length", "abort", "hang up"]
    patience: int  # answers in the stream that the client awaits before it ends the request early

    @property
    def is_exact(self) -> bool:
        """Whether it attends to all of its tokens, all the time."""
        return len(self.prompt) + self.max_new_tokens <= self.budget


@dataclass(frozen=True)
class Report:
    """What the run saw."""

    answered: int
    aborted: int
    hung_up: int
    retracted: int
    cached_tokens: int
    freekv: dict[str, int]


def make_jobs(num_requests: int, seed: int) -> list[Job]:
    """Draw requests; equal seeds give equal requests."""
    rng = random.Random(seed)
    documents = [_tokens(rng, MAX_PROMPT_TOKENS) for _ in range(4)]
    jobs = []
    for _ in range(num_requests):
        length = _log_uniform(rng, MAX_PROMPT_TOKENS)
        shared = rng.choice((0, length // 2, length - 1))
        prompt = rng.choice(documents)[:shared] + _tokens(rng, length - shared)
        ending = rng.choices(("length", "abort", "hang up"), (8, 1, 1))[0]
        new_tokens = _log_uniform(rng, _MAX_NEW_TOKENS) if ending == "length" else _MAX_NEW_TOKENS
        jobs.append(Job(prompt, new_tokens, rng.choice(_BUDGETS), ending, rng.choice((0, 1, 20))))
    rounds = [jobs[first : first + _REQUESTS_PER_ROUND] for first in range(0, num_requests, _REQUESTS_PER_ROUND)]
    # Long answers first: they outgrow the host store together, and nobody decodes alone at the end of a round.
    return [job for jobs in rounds for job in sorted(jobs, key=lambda job: -job.max_new_tokens)]


def _log_uniform(rng: random.Random, most: int) -> int:
    return round(math.exp(rng.uniform(0, math.log(most))))


def _tokens(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(256), k=count)


def run(server: Server, num_requests: int, seed: int) -> Report:
    """Send the requests in rounds; check every answer, and the server after each round.

    Raises
    ------
    AssertionError
        If an answer is missing or wrong, the log shows an error, or the server is not whole.
    """
    jobs = make_jobs(num_requests, seed)
    answers: list[dict] = []  # the last of each request
    for first in range(0, num_requests, _REQUESTS_PER_ROUND):
        with ThreadPoolExecutor(_CLIENTS) as clients:
            answers += clients.map(partial(_play, server), jobs[first : first + _REQUESTS_PER_ROUND])
        server.flush()
        state = server.freekv()
        assert state["tree_tokens"] == 0
        assert state["absent_pages"] == 0
    _compare_with_unhurried(server, jobs, answers, random.Random(seed))

    log = server.log.read_text()
    errors = [line for line in log.splitlines() if _ERROR.search(line)]
    assert not errors, "\n".join(errors[:10])
    finished = [answer for answer in answers if _finish_reason(answer) == "length"]
    return Report(
        answered=len(finished),
        aborted=sum(_finish_reason(answer) == "abort" for answer in answers),
        hung_up=sum(_finish_reason(answer) is None for answer in answers),
        retracted=sum(map(int, re.findall(r"#retracted_reqs: (\d+)", log))),
        cached_tokens=sum(answer["meta_info"]["cached_tokens"] for answer in finished),
        freekv=state,
    )


def _play(server: Server, job: Job) -> dict:
    """Be the client of one request; returns the last answer that it read, {} where it read none."""
    last: dict = {}
    rid = uuid.uuid4().hex
    with closing(_stream(server, rid, job)) as stream:
        for num_read, answer in enumerate(stream):
            last = answer
            if num_read == job.patience and job.ending == "abort":
                server.request("/abort_request", {"rid": rid})
            if num_read == job.patience and job.ending == "hang up":
                break
    if job.ending == "length":
        assert len(last["output_ids"]) == job.max_new_tokens, last
    return last


def _stream(server: Server, rid: str, job: Job) -> Iterator[dict]:
    """Answers of one request as they arrive, the first of them, empty, before it has been scheduled."""
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": job.max_new_tokens}
    params["custom_params"] = {"freekv_budget": job.budget}
    body = {"rid": rid, "input_ids": job.prompt, "sampling_params": params, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        yield {}
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


def _finish_reason(answer: dict) -> str | None:
    reason = answer.get("meta_info", {}).get("finish_reason")
    return reason and reason["type"]


def _compare_with_unhurried(server: Server, jobs: list[Job], answers: list[dict], rng: random.Random) -> None:
    """Requests within their budget were answered as they are alone on an empty server."""
    exact = [i for i, job in enumerate(jobs) if job.is_exact and job.ending == "length"]
    for i in rng.sample(exact, min(_NUM_COMPARED, len(exact))):
        server.flush()
        alone = _play(server, jobs[i])
        assert alone["output_ids"] == answers[i]["output_ids"], f"request {i}: {jobs[i]}"
    assert exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("audit_run.log"), help="of the server")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        MODEL.write(Path(folder))
        with serve(Path(folder), arguments.log, *FLAGS, env=STRICT | HASTE) as server:
            start = time.monotonic()
            report = run(server, arguments.requests, arguments.seed)
            print(f"{report}\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
