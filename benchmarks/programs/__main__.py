"""Programs of SGLang's frontend language, run in batch on plain SGLang and on FreeKV: seconds, and equal results.

    python -m benchmarks.programs [--quick] [-- --freekv-tau 0.8]

The trained model answers questions about documents, in four ways: in the branches of a fork, by choosing among given
answers, within a regular expression, and turn by turn. Every program of a batch has a document of its own, which its
requests share. One budget covers the documents, so that results must equal those of plain SGLang; the others do not.
All servers live through the whole run, and only one of them ever runs. In each round every server runs a batch that
no server has seen; the first round only warms up. A round gives a ratio, and the median of the ratios is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import sglang as sgl

from benchmarks.footprint import FULL_ATTENTION
from benchmarks.needle import MODEL
from benchmarks.programs.frontend import NUM_QUESTIONS, PROGRAMS, Job, draw_job, run_batch
from benchmarks.records import RESULTS, ROOT, RecordWriter
from benchmarks.server import Server, retrieval_numbers

BASELINE = "plain SGLang"
BUILD = ROOT / "build" / "programs"
_ROOM = 1024  # tokens of a document's questions and answers, at most


class Run(NamedTuple):
    """One batch on one server."""

    seconds: float
    answers: list[list[str]]
    freekv: dict[str, float]  # by metric: what FreeKV stored and recalled; empty for plain SGLang


def measure(server: Server, program: sgl.SglFunction, jobs: Sequence[Job]) -> Run:
    """Run one batch with an empty prefix cache."""
    with server.thawed():
        server.flush_cache()
        before = server.freekv()
        start = time.perf_counter()
        answers = run_batch(program, jobs, server.url)
        seconds = time.perf_counter() - start
        after = server.freekv()
    if before is None:
        return Run(seconds, answers, {})
    numbers = {name: value for name, (value, _) in retrieval_numbers(before, after).items()}
    return Run(seconds, answers, {"tree_tokens": after["tree_tokens"], **numbers})


def start_servers(args: argparse.Namespace, stack: contextlib.ExitStack) -> Iterator[tuple[int | None, Server]]:
    """Start plain SGLang, then FreeKV once for each budget, each frozen when it is ready; `stack` ends them."""
    requests = args.programs * NUM_QUESTIONS
    tokens = requests * (args.context + _ROOM)  # branches that start before their document is stored read it themselves
    flags = f"--model-path {args.model} --dtype float32 --page-size 32 --device cpu --chunked-prefill-size 8192"
    flags += f" --max-running-requests {requests} --max-total-tokens {tokens}"
    flags += " --mem-fraction-static 0.8 --sleep-on-idle --watchdog-timeout 100000"  # a frozen server is not hung
    for budget in (None, *args.budgets):
        retrieval = ["--kv-retrieval", "freekv", "--freekv-budget", str(budget), *args.freekv_flags]
        name = f"freekv-{budget}" if budget else "plain"
        print(f"starting {name} ...", flush=True)
        server = Server(name, flags.split() + (retrieval if budget else []), BUILD / f"{name}.log")
        stack.callback(server.stop)
        server.freeze()
        yield budget, server


def compare(
    name: str, servers: dict[int | None, Server], args: argparse.Namespace
) -> Iterator[tuple[int, list[Run], list[Run]]]:
    """Runs of one program: the budget, those of plain SGLang, those of FreeKV."""
    runs: dict[int | None, list[Run]] = {budget: [] for budget in servers}
    for number in range(args.rounds + 1):
        rng = Random(f"{name} {number}")
        jobs = [draw_job(rng, args.context) for _ in range(args.programs)]
        for budget, server in servers.items():
            runs[budget].append(measure(server, PROGRAMS[name], jobs))
    for budget in args.budgets:
        yield budget, runs[None][1:], runs[budget][1:]


def write(writer: RecordWriter, params: dict[str, Any], plain: list[Run], freekv: list[Run]) -> None:
    """Write the records of one program and budget, and print them in a line."""
    ratio = statistics.median(new.seconds / old.seconds for new, old in zip(freekv, plain, strict=True))
    new, old = (statistics.median(run.seconds for run in runs) for runs in (freekv, plain))
    pairs = [
        pair
        for ours, theirs in zip(freekv, plain, strict=True)
        for answers in zip(ours.answers, theirs.answers, strict=True)
        for pair in zip(*answers, strict=True)
    ]
    equal = statistics.mean(ours == theirs for ours, theirs in pairs)
    stored = statistics.mean(run.freekv["tree_tokens"] for run in freekv) / params["programs"]
    recalled = statistics.mean(run.freekv["recalled_per_token"] for run in freekv)
    writer.write("batch_time", new, "s", params, baseline=BASELINE, baseline_value=old, ratio=ratio)
    writer.write("equal_answers", equal, "ratio", params)
    writer.write("stored_per_program", stored, "tokens", params)
    writer.write("recalled_per_token", recalled, "bytes", params)
    for name in FULL_ATTENTION.records():
        writer.write(name, statistics.mean(run.freekv[name] for run in freekv), "ratio", params)
    print(
        f"{params['program']:>10}, budget {params['budget']}: {old:.2f} -> {new:.2f} s, ratio {ratio:.2f}; "
        f"{equal:.3f} of {len(pairs)} answers equal; {stored:,.0f} tokens stored per program, "
        f"{recalled:,.0f} bytes recalled per token",
        flush=True,
    )


def run(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # the servers end, too
    writer = RecordWriter("programs", args.out)
    with contextlib.ExitStack() as stack:
        servers = dict(start_servers(args, stack))
        for name in PROGRAMS:
            for budget, plain, freekv in compare(name, servers, args):
                params = {"program": name, "context": args.context, "programs": args.programs, "budget": budget}
                write(writer, params, plain, freekv)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a model that knows the needle language")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a document")
    parser.add_argument("--budgets", type=int, nargs="+", help="tokens, a server for each; default: all, and 512")
    parser.add_argument("--programs", type=int, default=4, help="in a batch")
    parser.add_argument("--rounds", type=int, default=5, help="batches that count, on each server")
    parser.add_argument("--quick", action="store_true", help="1K tokens, two rounds; records go to build/")
    parser.add_argument("--out", type=Path, help="file of the records")
    parser.add_argument("freekv_flags", nargs="*", help="after --: more flags for the FreeKV servers")
    args = parser.parse_args()
    if args.quick:
        args.context, args.rounds = 1024, 2
    args.budgets = args.budgets or [args.context + _ROOM, 512]
    args.out = args.out or (BUILD if args.quick else RESULTS) / "programs.jsonl"
    return args


if __name__ == "__main__":
    run(parse_args())
