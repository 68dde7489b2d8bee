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
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from servers import Server, serve

from sglang_freekv.tiny_model import TinyModel

MODEL = TinyModel(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, dtype="float32")
MAX_PROMPT_TOKENS = 8192
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}

_BUDGET, _MAX_BUDGET = 192, 256  # tokens; far below most prompts
_HOST_TOKENS = 10240  # one request of the largest kind and a few small ones
_BLOCKS_GIB = 0.0094  # 10 requests' windows, about half of what the host store holds
FLAGS = (
    "--kv-retrieval freekv --dtype float32 --freekv-audit --chunked-prefill-size 1024 --freekv-arena 2048 "
    f"--max-total-tokens {_HOST_TOKENS} --freekv-budget {_BUDGET} --freekv-max-budget {_MAX_BUDGET} "
    f"--freekv-sink 32 --freekv-recent 32 --freekv-device-blocks-memory {_BLOCKS_GIB} "
    # Admit on the assumption that requests stop early: they do not, and some are retracted.
    "--schedule-conservativeness 0.05"
).split()

_CLIENTS = 16
_REQUESTS_PER_ROUND = 100  # then the cache is flushed
_NUM_COMPARED = 20
_ERRORS = re.compile(r"Traceback|AuditError|leak|Exception|CRITICAL|Out of memory", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """One request and how it ends."""

    prompt: list[int]
    max_new_tokens: int
    budget: int  # tokens
    ending: Literal["length", "abort", "hang up"]
    patience_s: float  # until it is aborted or the client hangs up

    @property
    def is_exact(self) -> bool:
        """Whether it attends to all of its tokens, all the time."""
        return len(self.prompt) + self.max_new_tokens <= self.budget

    def body(self, rid: str) -> dict:
        params = {
            "temperature": 0,
            "ignore_eos": True,
            "max_new_tokens": self.max_new_tokens,
            "custom_params": {"freekv_budget": self.budget},
        }
        return {"rid": rid, "input_ids": self.prompt, "sampling_params": params}


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
    rng = random.Random(seed)
    documents = [_tokens(rng, MAX_PROMPT_TOKENS) for _ in range(4)]
    jobs = []
    for _ in range(num_requests):
        length = _log_uniform(rng, MAX_PROMPT_TOKENS)
        shared = rng.choice((0, length // 2, length - 1))
        prompt = rng.choice(documents)[:shared] + _tokens(rng, length - shared)
        ending = rng.choices(("length", "abort", "hang up"), (8, 1, 1))[0]
        budget = rng.choice((_BUDGET - 64, _BUDGET, _MAX_BUDGET))
        jobs.append(Job(prompt, _log_uniform(rng, 64), budget, ending, rng.uniform(0, 1)))
    return jobs


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
    outputs, cached_tokens = {}, 0
    for first in range(0, len(jobs), _REQUESTS_PER_ROUND):
        indices = range(first, min(first + _REQUESTS_PER_ROUND, len(jobs)))
        with ThreadPoolExecutor(_CLIENTS) as clients:
            answers = clients.map(lambda i: _send(server, f"{seed}-{i}", jobs[i]), indices)
            for i, answer in zip(indices, answers, strict=True):
                if answer is not None:
                    outputs[i] = answer["output_ids"]
                    cached_tokens += answer["meta_info"]["cached_tokens"]
        server.flush()
        assert server.freekv()["tree_tokens"] == 0

    kinds = [job.ending for job in jobs]
    log = server.log.read_text()
    errors = [line for line in log.splitlines() if _ERRORS.search(line)]
    assert not errors, errors[:5]
    state = server.freekv()
    assert state["absent_pages"] == 0
    _compare_with_unhurried(server, jobs, outputs, seed)
    server.flush()
    retracted = sum(map(int, re.findall(r"#retracted_reqs: (\d+)", log)))
    return Report(
        len(outputs), kinds.count("abort"), kinds.count("hang up"), retracted, cached_tokens, state
    )


def _send(server: Server, rid: str, job: Job) -> dict | None:
    """Play a client; returns the answer of a request that was not cut short."""
    if job.ending == "hang up":
        _hang_up(server, rid, job)
        return None
    if job.ending == "abort":
        abort = threading.Timer(job.patience_s, server.request, ("/abort_request", {"rid": rid}))
        abort.start()
        reply = server.request("/generate", job.body(rid))
        abort.join()
        assert reply.status in (200, 400, 503), reply
        return None
    reply = server.request("/generate", job.body(rid))
    assert reply.status == 200, reply
    assert len(reply.body["output_ids"]) == job.max_new_tokens, reply
    return reply.body


def _hang_up(server: Server, rid: str, job: Job) -> None:
    body = json.dumps(job.body(rid) | {"stream": True}).encode()
    request = urllib.request.Request(server.url + "/generate", body, {"Content-Type": "application/json"})
    with closing(urllib.request.urlopen(request, timeout=300)):
        time.sleep(job.patience_s)


def _compare_with_unhurried(server: Server, jobs: list[Job], outputs: dict[int, list[int]], seed: int) -> None:
    """Requests within their budget say the same when they are alone on an empty server."""
    exact = [i for i in outputs if jobs[i].is_exact]
    for i in random.Random(seed).sample(exact, min(_NUM_COMPARED, len(exact))):
        server.flush()
        alone = _send(server, f"{seed}-{i}-alone", jobs[i])
        assert alone["output_ids"] == outputs[i], f"request {i} of seed {seed}: {alone['output_ids']} != {outputs[i]}"
    assert exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        MODEL.write(Path(folder, "model"))
        with serve(Path(folder, "model"), Path(folder, "log"), *FLAGS, env=STRICT) as server:
            start = time.monotonic()
            try:
                report = run(server, arguments.requests, arguments.seed)
            finally:
                Path("/tmp/fk/h5_audit.log").write_text(server.log.read_text())
            print(f"{report}\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
