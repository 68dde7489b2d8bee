"""Drive the memory side for a million steps: ``python -m tools.fuzz``.

Rounds run side by side, one process per core, each from a seed of its own; one that fails is shrunk, and printed with
the command that repeats it. With ``--out FILE`` the numbers are appended to a file of records.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import count
from multiprocessing import get_context
from pathlib import Path

from benchmarks.records import RecordWriter
from tools.fuzz import worker
from tools.fuzz.written_for import obstacle

_PROGRESS_S = 30.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop after so many (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so many, if that is earlier")
    parser.add_argument("--seed", type=int, default=None, help="of the first round (default: the time)")
    parser.add_argument("--rounds", type=int, default=None, help="stop after so many, if that is earlier")
    parser.add_argument("--baselines", action="store_true", help="with the selectors that are compared with")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append the numbers to this file of records")
    args = parser.parse_args()
    if found := obstacle():
        raise SystemExit(f"error: {found}; install that release for it.")
    writer = RecordWriter("fuzz", args.out, module="tools.fuzz") if args.out else None
    first_seed = int(time.time()) if args.seed is None else args.seed
    print(f"fuzz: {args.steps:,} steps, seeds from {first_seed} on, {args.workers} processes", flush=True)
    steps, rounds, failures = _explore(args, first_seed)
    for seed, failure in failures:
        print(f"{failure}\nfuzz: seed {seed} fails")
    print(f"fuzz: {steps:,} steps in {rounds:,} rounds, {len(failures)} failures")
    if writer:
        params = {"first_seed": first_seed, "workers": args.workers, "baselines": args.baselines}
        writer.write("steps", steps, "steps", params)
        writer.write("rounds", rounds, "rounds", params)
        writer.write("failures", len(failures), "rounds", params)
    return bool(failures)


def _explore(args: argparse.Namespace, first_seed: int) -> tuple[int, int, list[tuple[int, str]]]:
    """Steps, rounds, and the seeds that failed with what was wrong."""
    start = shown = time.monotonic()
    deadline = start + 60 * args.minutes if args.minutes else float("inf")
    seeds = count(first_seed) if args.rounds is None else iter(range(first_seed, first_seed + args.rounds))
    running: dict[Future, int] = {}
    steps, rounds, failures = 0, 0, []
    with ProcessPoolExecutor(args.workers, get_context("spawn"), worker.start) as pool:
        while True:
            may_go_on = not failures and steps < args.steps and time.monotonic() < deadline
            while may_go_on and len(running) < args.workers and (seed := next(seeds, None)) is not None:
                running[pool.submit(worker.run, seed, args.baselines)] = seed
            if not running:
                return steps, rounds, failures
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                seed, (count_of_round, failure) = running.pop(done), done.result()
                steps, rounds = steps + count_of_round, rounds + 1
                failures += [(seed, failure)] if failure else []
            if time.monotonic() - shown > _PROGRESS_S:
                shown = time.monotonic()
                print(f"  {steps:,} steps, {steps / (shown - start):.0f}/s, last seed {seed}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
