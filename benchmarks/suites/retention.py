"""The five programs of `cache-pressure`: what a prefix cache really keeps, and what it is worth.

Each has its own sizes, so that the pool of tokens overflows where that is the point; all run in one server's pool.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.server import Server
from benchmarks.suites.packages import environment, packages, run
from benchmarks.suites.sides import CONCURRENCY, PLAIN
from benchmarks.suites.steps import Step, Suites
from benchmarks.throughput.setups import PLAIN as BASELINE

POOL = 16384  # tokens
Numbers = dict[str, tuple[float, str]]  # by metric: value and unit


class Program(NamedTuple):
    """One program: its module, its flags beside the server's address, seconds on two cores, and how it is read."""

    module: str
    flags: str
    seconds: float
    read: Callable[[dict], Numbers]


# A number that a program could not measure is 0: the part would hide it otherwise.


def _pressure(result: dict) -> Numbers:
    return {
        "retained_share": (result["retained_tokens"] / result["capacity_tokens"], "of 1"),
        "cold_ttft": (result["cold_ttft"] or 0.0, "s"),
        "hit_ttft": (result["hit_ttft"] or 0.0, "s"),
    }


def _needles(result: dict) -> Numbers:
    return {"needles_found": (_mean([row["ok"] for row in result["results"]]), "of 1")}


def _agents(result: dict) -> Numbers:
    rows = [row for row in result["records"] if not row["aborted"] and row["ttft"] is not None]
    turns = [row["reuse"] for row in rows if row["phase"] == "main" and row["step"] > 0]
    final = [row for row in rows if row["phase"] == "finalize"]
    return {
        "reuse": (_mean(turns), "of 1"),
        "final_reuse": (_mean([row["reuse"] for row in final]), "of 1"),
        "final_ttft": (_mean([row["ttft"] for row in final]), "s"),
    }


def _aborts(result: dict) -> Numbers:
    return {"reuse_after_abort": (_mean([row["reuse"] or 0 for row in result["records"]]), "of 1")}


def _speeds(result: dict) -> Numbers:
    summary = result["summary"]
    speeds = {"prefill_speed": summary["pp"], "decode_speed": summary["tg"]}
    return {name: ((values[-1] if values else None) or 0.0, "tokens/s") for name, values in speeds.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


PROGRAMS = {
    "cache-pressure": Program("core", f"--kv-size {POOL} --context-tokens 2000 --margin 2", 60, _pressure),
    "needle-test": Program("needle", "--lengths 1000,2000,4000,6000 --max-tokens 24 --salt 1", 60, _needles),
    "agent-sim": Program(
        "agent_sim",
        "--sessions 2 --main-tokens 4000 --sub-tokens 1500 --sub-windows 1 --step-tokens 1000 --finalize-tokens 500 "
        "--max-tokens 16 --no-viz --salt 1",
        90,
        _agents,
    ),
    "abort-sim": Program(
        "abort_sim", "--context-tokens 4000 --thinking-tokens 24 --max-tokens 1024 --runs 2 --salt 1", 50, _aborts
    ),
    "perf-sim": Program("perf_sim", "--step-tokens 1500 --output-tokens 24 --runs 1 --salt 1", 60, _speeds),
}
QUICK_PROGRAMS = ("needle-test", "abort-sim")


def steps(suites: Suites) -> list[Step]:
    """A step for all programs, on servers whose pool of tokens is small."""
    names = QUICK_PROGRAMS if suites.is_quick else tuple(PROGRAMS)
    cost = sum(PROGRAMS[name].seconds for name in names) * (1 + len(suites.methods))
    return [Step(f"cache-pressure, {len(names)} programs", cost, lambda: _compare(suites, names))]


def _compare(suites: Suites, names: tuple[str, ...]) -> None:
    plain: dict[str, Numbers] = {}
    for side in suites.sides(suites.budgets[-1]):
        folder = suites.folder / "cache_pressure" / side.name
        with suites.servers.start(side, f"{side.name}-pool", tokens=POOL, requests=CONCURRENCY) as server:
            for name in names:
                numbers = _run(server, name, folder)
                plain.setdefault(name, numbers)
                if side is not PLAIN:
                    params = {"suite": "cache_pressure", "program": name, "pool": POOL, **side.params}
                    for metric, (value, unit) in numbers.items():
                        other = plain[name][metric][0]
                        suites.writer.write(metric, value, unit, params, baseline=BASELINE, baseline_value=other)


def _run(server: Server, name: str, folder: Path) -> Numbers:
    """Run one program. One that finds a cache wanting ends with status 1: it has come to its end, too."""
    place, program, out = packages(), PROGRAMS[name], folder / f"{name}.json"
    out.unlink(missing_ok=True)
    server.flush_cache()
    flags = ["--base-url", f"{server.url}/v1", "--output", str(out), *program.flags.split()]
    run(["-m", f"cache_pressure.{program.module}", *flags], folder / f"{name}.log", environment(place), (0, 1))
    if not out.exists():
        raise RuntimeError(f"{name} has written no result; its messages are in {folder / f'{name}.log'}")
    return program.read(json.loads(out.read_text()))
