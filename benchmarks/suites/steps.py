"""What a part of the suites gets, and the steps that it consists of, with the time that is left."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.methods import Method
from benchmarks.records import RecordWriter
from benchmarks.suites.sides import PLAIN, Servers, Side


@dataclass(frozen=True)
class Suites:
    """One run, of one part or of several. `budgets` and `samples` belong to `contexts`, one each."""

    model: Path
    methods: tuple[Method, ...]  # beside full attention
    contexts: tuple[int, ...]  # tokens, ascending
    budgets: tuple[int, ...]  # tokens
    samples: tuple[int, ...]  # of each task
    tasks: frozenset[str]  # of RULER and of lm-eval, where not all are wanted
    is_quick: bool
    servers: Servers
    writer: RecordWriter
    folder: Path  # of what the suites' programs read and write

    def sides(self, budget: int) -> list[Side]:
        """Plain SGLang first."""
        return [PLAIN, *(Side(method, budget) for method in self.methods)]

    def wanted(self, tasks: Iterable[str]) -> tuple[str, ...]:
        """Those tasks that were asked for."""
        return tuple(task for task in tasks if not self.tasks or task in self.tasks)


class Step(NamedTuple):
    """A piece of work that ends with its records."""

    name: str
    cost: float  # expected seconds, all sides together; only its share in the sum counts
    run: Callable[[], None]


def run_steps(steps: Sequence[Step]) -> list[str]:
    """Run them one after the other, and say before each how long the rest takes; one that fails ends no other.

    Returns
    -------
    Names of the steps that have failed.
    """
    start, done, total = time.monotonic(), 0.0, sum(step.cost for step in steps)
    failed = []
    for number, step in enumerate(steps, start=1):
        left = f", about {(time.monotonic() - start) * (total / done - 1) / 60:.0f} min left" if done else ""
        print(f"[{number}/{len(steps)}] {step.name}{left}", flush=True)
        try:
            step.run()
        except Exception:
            traceback.print_exc()
            failed.append(step.name)
        done += step.cost
    return failed
