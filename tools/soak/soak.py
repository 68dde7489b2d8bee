"""A soak: rounds of traffic against one server, which is judged after each of them and at the end."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from tools.servers import Server
from tools.soak.clients import Outcome, play
from tools.soak.process_memory import ProcessMemory
from tools.soak.references import Reference
from tools.soak.traffic import Action, Traffic

_CLIENTS = 24
_IDLE_SECONDS = 60  # after which a page that is not back is lost
_FLUSH_EVERY = 2  # rounds
_SAMPLES = 200  # of memory, in all
_ERROR = re.compile(r"Traceback|AuditError|leak|CRITICAL|out of memory|Scheduler hit an exception", re.IGNORECASE)


@dataclass
class Summary:
    """What a soak has seen. It exists only where nothing was wrong."""

    seed: int
    seconds: float = 0
    rounds: int = 0
    requests: Counter[str] = field(default_factory=Counter)  # by kind
    ended: Counter[str] = field(default_factory=Counter)
    compared: int = 0  # outputs, each equal to its reference
    cached_tokens: int = 0
    retractions: int = 0
    flushes: int = 0  # of an idle server
    leaked_tokens: int = 0  # of the host store, found before each flush
    memory_mib: float = 0  # resident, of all processes, at the end
    memory_slope_mib_per_hour: float = 0  # over the second half
    state: dict = field(default_factory=dict)  # of the server at the end

    def add(self, outcome: Outcome) -> None:
        self.requests[outcome.kind] += 1
        self.ended[outcome.ended] += 1
        self.compared += outcome.is_compared
        self.cached_tokens += outcome.cached_tokens
        self.retractions += outcome.retractions

    def __str__(self) -> str:
        counters = ("decoded_tokens", "flagged_rows", "misses", "tree_evicted_tokens", "absent_pages")
        values = vars(self) | {"state": {name: self.state.get(name) for name in counters}}
        lines = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
        return "\n".join(f"  {name.replace('_', ' '):26}{_short(value)}" for name, value in lines.items())


def soak(
    server: Server,
    references: list[Reference],
    seconds: float,
    seed: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Send rounds of traffic until the time is over, but at least a mixed one and a burst.

    Parameters
    ----------
    progress
        Called with a line after each round.

    Raises
    ------
    AssertionError
        If an answer is missing or wrong, a page is lost or was absent, the log shows an error, or memory grows.
    """
    traffic, summary, memory = Traffic(references, seed), Summary(seed), ProcessMemory()
    start, num_read = time.monotonic(), 0
    with memory.sampled(server.pid, period_s=max(seconds / _SAMPLES, 0.5)):
        while time.monotonic() - start < seconds or summary.rounds < 2:
            try:
                _run_round(server, traffic.next_round(summary.rounds), summary)
                summary.leaked_tokens += assert_whole(server)
                summary.rounds += 1
                if summary.rounds % _FLUSH_EVERY == 0:
                    assert_empty_after_flush(server)
                    summary.flushes += 1
            except (OSError, AssertionError) as error:
                error.add_note(f"in round {summary.rounds} of seed {seed}; the log ends in\n{_tail(server)}")
                raise
            num_read = assert_silent(server, num_read)
            progress(_progress(summary, memory, seconds - (time.monotonic() - start)))
    summary.seconds = time.monotonic() - start
    summary.state = server.freekv()
    assert summary.state["absent_pages"] == 0
    summary.memory_slope_mib_per_hour, summary.memory_mib = memory.slope_mib_per_hour(), memory.rss_mib[-1]
    assert memory.is_stable(), f"memory grows by {summary.memory_slope_mib_per_hour:.0f} MiB/hour: {memory.rss_mib}"
    return summary


def _run_round(server: Server, actions: list[Action], summary: Summary) -> None:
    with ThreadPoolExecutor(_CLIENTS) as clients:
        for outcome in clients.map(partial(play, server), actions):
            summary.add(outcome)


def assert_whole(server: Server) -> int:
    """Wait until every page is free or in the tree (a flush would free all); returns the tokens that are not."""
    deadline = time.monotonic() + _IDLE_SECONDS
    while True:
        state = server.freekv()
        missing = state["host_tokens"] - state["host_free_tokens"] - state["tree_tokens"]
        if missing == 0 and state["tree_protected_tokens"] == 0:
            assert state["absent_pages"] == 0, state
            return missing
        assert time.monotonic() < deadline, f"{missing} tokens belong to nobody, or requests do not end: {state}"
        time.sleep(0.2)


def assert_empty_after_flush(server: Server) -> None:
    """The prefix cache can be emptied, and then the whole store is free."""
    server.flush()
    state = server.freekv()
    assert (state["tree_tokens"], state["host_free_tokens"]) == (0, state["host_tokens"]), state


def assert_silent(server: Server, num_read: int = 0) -> int:
    """No line of the log after the first `num_read` characters tells of an error; returns the characters read."""
    log = server.log.read_text(errors="replace")
    errors = [line for line in log[num_read:].splitlines() if _ERROR.search(line)]
    assert not errors, "\n".join(errors[:10])
    return len(log)


def _progress(summary: Summary, memory: ProcessMemory, left: float) -> str:
    left = max(left, 0)
    rss = f", {memory.rss_mib[-1]:.0f} MiB resident" if memory.rss_mib else ""
    return (
        f"{int(left // 60):3d}:{int(left % 60):02d} left, round {summary.rounds}: {summary.requests.total()} requests, "
        f"{summary.ended['length']} finished, {summary.compared} compared, {summary.ended['refused']} refused, "
        f"{summary.ended['abort']} aborted, {summary.ended['hung_up'] + summary.ended['left']} left, "
        f"{summary.retractions} retractions{rss}"
    )


def _short(value: object) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def _tail(server: Server) -> str:
    return server.log.read_text(errors="replace")[-3000:]
