"""Every setting is a server, one after the other, and all of them get the same sessions, in batches."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.accuracy import results
from benchmarks.accuracy.client import Client, ServerClient, play, read_documents, scores
from benchmarks.accuracy.results import Result, make_key
from benchmarks.accuracy.settings import Setting, read_geometry
from benchmarks.accuracy.tasks.session import Session, Task
from benchmarks.server import Server

_DECODE_COST = 8  # a generated token takes about as long as so many of a prompt; for the time left only
_STREAM_INTERVAL = 8  # tokens; streaming costs the client's and the tokenizer's share of the cores
_SPARE_REQUESTS = 4  # SGLang counts some twice; a retrieval server runs as many as its device blocks hold
_STEP_SECONDS = 3600  # a long prompt takes minutes on a CPU

Start = Callable[[Setting], AbstractContextManager[Client]]


class Batch(NamedTuple):
    """Sessions that are played at once."""

    task: str
    group: str
    context: int
    sessions: list[Session]
    digest: str  # of all prompts

    @property
    def is_multi_turn(self) -> bool:
        return any(len(session.turns) > 1 for session in self.sessions)

    @property
    def cost(self) -> int:
        """Relative time of playing it once."""
        turns = [turn for session in self.sessions for turn in session.turns]
        return sum(len(turn.prompt) + _DECODE_COST * turn.max_new_tokens for turn in turns)

    def cell(self, setting: Setting, budget: int | None) -> dict:
        params = {"task": self.task, "group": self.group, "context": self.context, **setting.params}
        return params if budget is None else {**params, "budget": budget}


def draw_batches(tasks: Sequence[Task], contexts: Sequence[int], count: int, seed: int, size: int) -> list[Batch]:
    """Sessions of every task and context, in batches of `size`."""
    batches = []
    for context in contexts:
        for task in tasks:
            sessions = task.sessions(seed, count, context)
            for part in (sessions[i : i + size] for i in range(0, len(sessions), size)):
                prompts = json.dumps([[turn._replace(score=None) for turn in session.turns] for session in part])
                digest = hashlib.sha256(prompts.encode()).hexdigest()[:16]
                batches.append(Batch(task.name, task.group, context, part, digest))
    return batches


@dataclass
class Matrix:
    """Plays batches with settings, and keeps the results in a file.

    Parameters
    ----------
    start : callable
        Starts the server of a setting, for as long as its context lasts.
    server_digest : callable
        What the answers of a setting's server depend on.
    """

    file: Path
    start: Start
    server_digest: Callable[[Setting], str]

    def run(self, settings: Sequence[Setting], batches: Sequence[Batch], servers: int = 1) -> list[Result]:
        """Play what the file does not have yet, on so many servers at a time. Interrupted, it ends after a batch.

        Returns
        -------
        The results of these settings and batches, in their order.
        """
        self._lock, self._is_ended = threading.Lock(), threading.Event()
        self._done = results.read(self.file)
        plan = [(setting, [(b, self._missing(setting, b)) for b in batches]) for setting in settings]
        plan = [(setting, [(b, budgets) for b, budgets in work if budgets]) for setting, work in plan]
        total = sum(batch.cost * len(budgets) for _, work in plan for batch, budgets in work)
        with (
            tqdm(total=total, unit="tok", unit_scale=True, smoothing=0.1, mininterval=_bar_seconds()) as bar,
            ThreadPoolExecutor(servers) as pool,
        ):
            jobs = [pool.submit(self._run_setting, setting, work, bar) for setting, work in plan if work]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                self._is_ended.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        keys = [self._key(setting, b, budget) for setting in settings for b in batches for budget in setting.budgets]
        return [self._done[key] for key in keys]

    def _key(self, setting: Setting, batch: Batch, budget: int | None) -> tuple[str, ...]:
        return make_key(batch.cell(setting, budget), batch.digest, self.server_digest(setting))

    def _missing(self, setting: Setting, batch: Batch) -> list[int | None]:
        return [budget for budget in setting.budgets if self._key(setting, batch, budget) not in self._done]

    def _run_setting(self, setting: Setting, work: Sequence[tuple[Batch, list[int | None]]], bar: tqdm) -> None:
        bar.set_description(f"starting {setting.name}")
        with self.start(setting) as client:
            for batch, budgets in work:
                is_read = setting.method.is_full  # plain SGLang reads a document with each request anyway
                for budget in budgets:
                    if self._is_ended.is_set():
                        return
                    bar.set_description(f"{setting.name} {batch.task} {batch.context} {budget or ''}", refresh=False)
                    cache = str(budget) if batch.is_multi_turn and budget is not None else None
                    if not is_read:
                        read_documents(client, batch.sessions, budget, cache)
                        is_read = cache is None
                    result = self._play(client, setting, batch, budget, cache)
                    with self._lock:
                        results.append(self.file, result)
                        self._done[result.key] = result
                        bar.update(batch.cost)

    def _play(self, client: Client, setting: Setting, batch: Batch, budget: int | None, cache: str | None) -> Result:
        before = client.counters()
        played = play(client, batch.sessions, budget, cache)
        after = client.counters()
        pairs = zip(batch.sessions, played.outputs, strict=True)
        return Result(
            cell=batch.cell(setting, budget),
            sessions=batch.digest,
            server=self.server_digest(setting),
            scores=[scores(session, outputs) for session, outputs in pairs],
            outputs=played.outputs,
            generated=played.generated,
            decoded=played.decoded,
            seconds=played.seconds,
            counters=after and {name: after[name] - before[name] for name in after},
        )


def _bar_seconds() -> float:
    """A bar in a log file is a line for each time that it moves."""
    return 0.5 if sys.stderr.isatty() else 20


@dataclass(frozen=True)
class Launcher:
    """Starts servers of one model."""

    model: Path
    longest: int  # tokens of a session
    concurrency: int
    seed: int
    logs: Path
    more_flags: tuple[str, ...] = ()

    def flags(self, setting: Setting) -> list[str]:
        """All flags of a setting's server; those that the user adds come last, and win."""
        batch = self.concurrency * -(-self.longest // 64) * 64  # tokens of a batch, in whole pages of every size
        flags = f"--model-path {self.model} --device cpu --dtype float32 --sampling-backend pytorch"
        flags += f" --max-running-requests {self.concurrency + _SPARE_REQUESTS} --random-seed {self.seed}"
        # As much again for the batches before: documents that are shared stay in the cache.
        flags += f" --max-total-tokens {2 * batch + 64} --mem-fraction-static 0.8"
        # Prompts in one piece: plain SGLang's attention computes the prefix again for every chunk.
        flags += f" --chunked-prefill-size {batch} --max-prefill-tokens {batch}"
        flags += f" --sleep-on-idle --watchdog-timeout {_STEP_SECONDS}"
        flags += f" --stream-interval {_STREAM_INTERVAL} --incremental-streaming-output"
        return [*flags.split(), *setting.flags(read_geometry(self.model), self.concurrency), *self.more_flags]

    def digest(self, setting: Setting) -> str:
        """Of what answers and counters depend on: the weights, and the flags but those of memory and logs."""
        flags = [*setting.flags(read_geometry(self.model), self.concurrency), *self.more_flags]
        text = json.dumps([self._weights, self.concurrency, self.seed, *flags])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def _weights(self) -> list[str]:
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(self.model.glob("*.safetensors"))]

    @contextlib.contextmanager
    def start(self, setting: Setting) -> Iterator[Client]:
        server = Server(setting.name, self.flags(setting), self.logs / f"{setting.name}.log")
        try:
            yield ServerClient(server)
        finally:
            server.stop()
