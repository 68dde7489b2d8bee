"""Plain SGLang and FreeKV under load, driven by SGLang's own `bench_serving`: one table per run.

    python -m benchmarks.throughput [--quick] [--ablations] [-- FREEKV_FLAGS]
    python -m benchmarks.throughput --dataset-path chats.json [--dataset-name sharegpt]

Both servers have the same model, flags and limits; what a run measures stands in workloads.py, and the flags in
setups.py. Before every workload the prefix cache is emptied. Phases:

- traffic: kinds of load, both servers with a cache of as many tokens;
- series: one length or one number of requests varies, for the pictures;
- memory: plain SGLang's cache gets as many bytes as all of FreeKV's device memory, and the same burst of requests;
- ablation (with --ablations): FreeKV with one setting changed at a time.

Without a GPU the servers of a phase live side by side and one is frozen (SIGSTOP) while the other is measured, so that
what disturbs the machine meets both; with a GPU, which cannot hold both, one follows the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.goals import goals_table
from benchmarks.records import RESULTS, ROOT, Record, RecordWriter, read_records
from benchmarks.throughput import client
from benchmarks.throughput.goals import goals_of
from benchmarks.throughput.pictures import draw
from benchmarks.throughput.report import brief, table
from benchmarks.throughput.run import Phase, Run
from benchmarks.throughput.setups import FREEKV, Common, Retrieval, ablations
from benchmarks.throughput.words import in_words
from benchmarks.throughput.workloads import ABLATION, FULL, MEMORY, QUICK, SERIES, TRAFFIC, Suite, Workload
from sglang_freekv.testing.tiny_model import TinyModel

BUILD = ROOT / "build" / "throughput"
# In float32 two servers agree on every token, in bfloat16 rounding alone flips some; sizes are those of bfloat16.
_CPU_DTYPES = {TRAFFIC: "float32"}
_SPARE_REQUESTS = 4  # the requests of the run before may not have left when the next ones come


def phases(args: argparse.Namespace, suite: Suite) -> list[Phase]:
    """The phases that were asked for, with the flags of their servers."""
    found = []
    for name in args.phases:
        workloads = suite.workloads.get(name, ())
        workloads = tuple(w for w in workloads if not args.workloads or w.name in args.workloads)
        if not workloads:
            continue
        # In traffic a burst must not fit into the cache; elsewhere it holds everything.
        tokens = max(w.least_tokens if name == TRAFFIC else w.all_tokens for w in workloads)
        if name in (TRAFFIC, SERIES):
            tokens = max(tokens, suite.tokens)
        longest = max(w.longest for w in workloads)
        common = Common(
            model=args.model,
            dtype="auto" if torch.cuda.is_available() else _CPU_DTYPES.get(name, "bfloat16"),
            tokens=_whole_pages(tokens),
            chunk=_whole_pages(max(suite.tokens, longest)),
            requests=_at_once(name, workloads, suite.running),
            server_flags=tuple(args.server_flags),
            freekv_flags=tuple(args.freekv_flags),
        )
        found.append(_phase(name, common, suite.budget, workloads, args.one_by_one))
    return found


def _whole_pages(tokens: int) -> int:
    """Rounded up for pages of any size."""
    return -(-tokens // 64) * 64


def _at_once(phase: str, workloads: tuple[Workload, ...], most: int) -> int:
    """Requests that run at once; in `memory` all of them, elsewhere a burst waits."""
    wanted = max(w.at_once for w in workloads)
    return wanted if phase == MEMORY else min(most, wanted) + _SPARE_REQUESTS


def _phase(name: str, common: Common, budget: int, workloads: tuple[Workload, ...], one_by_one: bool) -> Phase:
    if name == ABLATION:
        changed = [settings.setup(title, common) for title, settings in ablations(budget).items()]
        return Phase(name, common, [common.plain(), *changed], workloads, is_side_by_side=False)
    freekv = Retrieval(budget).setup(FREEKV, common)
    if name == MEMORY:
        plain = dataclasses.replace(common.plain(), equal_to=FREEKV)
        return Phase(name, common, [freekv, plain], workloads, not one_by_one)
    return Phase(name, common, [common.plain(), freekv], workloads, not one_by_one)


def suite_of(args: argparse.Namespace) -> Suite:
    """The suite of the size that was asked for, with the user's text, budget and prefix."""
    suite = QUICK if args.quick else FULL
    suite = dataclasses.replace(suite, budget=args.budget or suite.budget, tokens=args.tokens or suite.tokens)
    if args.dataset_path is not None:
        name = args.dataset_name or ("custom" if args.dataset_path.suffix == ".jsonl" else "sharegpt")
        output = (args.output_len, args.output_len)
        text = Workload("text", args.num_prompts, (1, 1), output, concurrency=8, dataset=(name, args.dataset_path))
        return dataclasses.replace(suite, workloads={TRAFFIC: (text,)})
    if args.prefix is not None:
        traffic = (
            dataclasses.replace(w, prefix=args.prefix) if w.name == "prefix" else w for w in suite.workloads[TRAFFIC]
        )
        suite = dataclasses.replace(suite, workloads={**suite.workloads, TRAFFIC: tuple(traffic)})
    return suite


def run(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # the servers end, too
    start = time.monotonic()
    client.prepare()
    if args.model is None:
        args.model = BUILD / "model"
        TinyModel(layers=args.layers).write(args.model)
    suite = suite_of(args)
    client_flags = ["--model", str(args.model), "--tokenizer", str(args.model), "--seed", "42"]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    writer = RecordWriter("throughput", args.out)
    bench = Run(args.build, tokenizer, [*client_flags, *args.client_flags], writer)
    todo = phases(args, suite)
    bench.run(todo)
    print(report(bench.records, [phase.name for phase in todo]))
    wide = args.build / "report.md"
    wide.write_text("\n".join(f"## {phase.name}\n\n{table(bench.records, phase.name)}" for phase in todo))
    pictures = draw(read_records(args.out), args.out.parent)
    print(f"{time.monotonic() - start:.0f} s")
    files = {"all columns": [wide], "records": [args.out], "pictures": pictures, "messages": [args.build]}
    for what, paths in files.items():
        print(f"{what}: {', '.join(map(os.path.relpath, paths)) or 'none, for want of a series'}")


def report(records: Sequence[Record], phases: Sequence[str]) -> str:
    """What a terminal shows of a run: tables that fit into it, what they say, and the goals that were measured."""
    tables = [f"{phase}\n\n{brief(records, phase).text()}" for phase in phases]
    goals = goals_table(goal for goal in goals_of(records) if goal.value is not None)
    return "\n".join(["", *tables, in_words(records), "", *([goals.text()] if len(goals.lines) > 1 else [])])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small workloads, some minutes; records go to build/")
    add("--ablations", action="store_true", help="also FreeKV with one setting changed at a time")
    add("--phases", nargs="+", choices=[TRAFFIC, SERIES, MEMORY, ABLATION], help="only these")
    add("--workloads", nargs="+", metavar="NAME", help="only these, by their names in workloads.py")
    add("--model", help="folder or name of a checkpoint (default: a tiny one with random weights)")
    add("--layers", type=int, default=2, help="of the tiny model; plain prefill is slow")
    add("--budget", type=int, help="tokens a request attends to (default: 1024, with --quick 512)")
    add("--tokens", type=int, help="that the cache holds in traffic and series (default: 65536, with --quick 24576)")
    add("--prefix", type=int, help="tokens of the shared prefix in traffic, e.g. 65536 (default: 16384)")
    add("--dataset-path", type=Path, help="text of your own instead of the workloads")
    add("--dataset-name", help="its kind, as bench_serving calls it (default: custom for .jsonl, else sharegpt)")
    add("--num-prompts", type=int, default=64, help="of your own text")
    add("--output-len", type=int, default=128, help="tokens generated for each of them")
    add("--server-flags", type=shlex.split, default=[], help='more flags for both servers, in quotes: "--tp 2"')
    add("--client-flags", type=shlex.split, default=[], help="more flags for bench_serving, in quotes")
    add("--one-by-one", action="store_true", default=torch.cuda.is_available(), help="servers never live side by side")
    add("--build", type=Path, default=BUILD, help="folder of logs, files and results of the clients")
    add("--out", type=Path, help="file of the records")
    add("freekv_flags", nargs="*", help="after --: more flags for FreeKV")
    args = parser.parse_args(argv)
    args.phases = args.phases or [TRAFFIC, SERIES, MEMORY, *([ABLATION] if args.ablations else [])]
    args.out = args.out or (args.build if args.quick else RESULTS) / "throughput.jsonl"
    return args


if __name__ == "__main__":
    run(parse_args())
