"""Suites that nobody here wrote, against the server: plain SGLang beside FreeKV, on SmolLM2 or a model of yours.

    python -m benchmarks.suites                        # all parts
    python -m benchmarks.suites ruler --methods exact freekv-0.9
    python -m benchmarks.suites agentic kits --quick   # small, and records go to build/
    python -m benchmarks.suites ruler --model FOLDER --contexts 4096 --budgets 1024 --samples 16

Parts: `ruler` (NVIDIA's package of it), `lm_eval` (its RULER tasks that need no download), `agentic` (SGLang's
bench_serving on conversations of a coding agent), `cache_pressure` (what a prefix cache keeps), `kits` (SGLang's own
test kits). The first three need a model that says something; most scores of a small one are low on both sides.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.methods import METHODS, parse_method
from benchmarks.records import RESULTS, RecordWriter
from benchmarks.suites import agentic, kits, lm_harness, retention, ruler
from benchmarks.suites.packages import BUILD, NotInstalled, packages
from benchmarks.suites.sides import Servers
from benchmarks.suites.steps import Suites, run_steps

PARTS = {
    "ruler": ruler.steps,
    "lm_eval": lm_harness.steps,
    "agentic": agentic.steps,
    "cache_pressure": retention.steps,
    "kits": kits.steps,
}
_NEED_PACKAGES = {"ruler", "lm_eval", "cache_pressure"}


def main() -> int:
    """Run the parts; return 1, with a sentence, where their packages cannot be had or a step has failed."""
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # the servers end, too
    try:
        if _NEED_PACKAGES & set(args.parts):
            packages()
    except NotInstalled as why:
        print(f"suites: {why}", file=sys.stderr)
        return 1
    with Servers(args.model, args.folder / "logs", tuple(args.server_flags)) as servers:
        suites = Suites(
            model=args.model,
            methods=tuple(args.methods),
            contexts=tuple(args.contexts),
            budgets=tuple(args.budgets),
            samples=tuple(args.samples),
            tasks=frozenset(args.tasks),
            is_quick=args.quick,
            servers=servers,
            writer=RecordWriter("suites", args.out),
            folder=args.folder.resolve(),
        )
        failed = run_steps([step for part in args.parts for step in PARTS[part](suites)])
    print(f"records in {args.out}; python -m benchmarks.tables makes tables of those in {RESULTS.name}/")
    if failed:
        print(f"suites: failed, see above: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.suites", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--model", type=Path, help="folder of a model (default: SmolLM2, fetched once)")
    add("--methods", nargs="+", default=["freekv-0.9"], help=f"of {', '.join(METHODS)}, or NAME=FLAGS for another")
    add("--contexts", type=int, nargs="+", default=[4096, 8192], help="tokens; all tasks at the first")
    add("--budgets", type=int, nargs="+", default=[512, 1024], help="tokens, one for each context")
    add("--samples", type=int, nargs="+", default=[4, 2], help="of each task, one for each context")
    add("--tasks", nargs="+", default=[], help="of RULER and of lm-eval (default: all)")
    add("--quick", action="store_true", help="one sample of few tasks at the first context; records go to build/")
    add("--folder", type=Path, default=BUILD, help="of what the suites' programs read and write")
    add("--out", type=Path, help="file of the records")
    add("server_flags", nargs="*", help="after --: more flags for every server")
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.server_flags = argv[cut + 1 :]
    return _complete(parser, args)


def _complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; give some of {', '.join(PARTS)}")
    args.parts = args.parts or list(PARTS)
    if unknown := [task for task in args.tasks if task not in {*ruler.TASKS, *lm_harness.TASKS}]:
        parser.error(f"there is no task {unknown[0]!r}; give some of {', '.join([*ruler.TASKS, *lm_harness.TASKS])}")
    if args.quick:
        args.contexts, args.budgets, args.samples = args.contexts[:1], args.budgets[:1], [1]
    if not len(args.contexts) == len(args.budgets) == len(args.samples):
        parser.error("give as many --budgets and --samples as --contexts: they belong together")
    if args.contexts != sorted(args.contexts):
        parser.error("give --contexts in ascending order")
    try:
        args.methods = [parse_method(name) for name in args.methods]
    except ValueError as why:
        parser.error(str(why))
    if any(method.is_full for method in args.methods):
        parser.error("full attention runs always; give the methods to compare it with")
    args.out = args.out or (BUILD if args.quick else RESULTS) / "suites.jsonl"
    args.model = args.model.resolve() if args.model else _smollm2(parser)
    return args


def _smollm2(parser: argparse.ArgumentParser) -> Path:
    from tools.pretrained import NotFetched, smollm2_folder

    try:
        return smollm2_folder()
    except NotFetched as why:
        parser.error(f"{why}, or give the folder of a model: --model FOLDER")


if __name__ == "__main__":
    sys.exit(main())
