"""Everything that only a GPU can tell, in one command: correctness, then numbers, in under nine minutes.

    python -m benchmarks.gpu --out DIR [--only PHASE,..] [--model-shape llama-8b]
    python -m benchmarks.gpu stage0 --out DIR         what needs torch, Triton and pytest only, in under four minutes
    python -m benchmarks.gpu [stage0] --rehearse      the same lines on a CPU, with tiny sizes
    python -m benchmarks.gpu PHASE --out DIR          one phase, in this process

Needs the package's dependencies and a CUDA compiler, stage 0 neither; no network, no make and no installation of this
package. Every phase is a process with a time limit and a log of its own; one that fails does not stop the others.
Measurements are appended to DIR/gpu_suite.jsonl as they come; DIR/report.md has them all, and the goals that were met
or missed.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
from importlib import import_module
from pathlib import Path

# What imports torch is imported when the command line has been read.
from benchmarks.gpu.phases import PHASES, STAGES, phases_of
from benchmarks.gpu.shapes import SHAPES

_ROOT = Path(__file__).parents[2]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The suite's options; after the name of a phase, those of the phase."""
    names = [phase.name for phase in PHASES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"phases, separated by commas, of {', '.join(names)}")
    _add_suite(parser, 9)
    stages = {f"stage{stage}": stage for stage in STAGES}
    commands = parser.add_subparsers(dest="phase", metavar="STAGE or PHASE", help=", ".join([*stages, *names]))
    for name, stage in stages.items():
        what, minutes = STAGES[stage]
        command = commands.add_parser(name, help=f"the phases that need {what}")
        command.set_defaults(only=",".join(phases_of(stage)))
        _add_suite(command, minutes)
    for phase in PHASES:
        command = commands.add_parser(phase.name)
        command.add_argument("--out", type=Path, required=True, help="folder of records")
        command.add_argument("--seconds", type=float, default=phase.seconds, help="what has not begun then is left out")
        _add_common(command)
    args = parser.parse_args(argv)
    if args.phase is None or args.phase in stages:
        args.phase = None
        _complete(args, parser, names)
    return args


def _add_suite(parser: argparse.ArgumentParser, minutes: int) -> None:
    parser.add_argument("--out", type=Path, help="folder of records, logs, caches and report; default build/gpu_suite")
    help = f"for everything (default: {minutes}); later phases are shortened or skipped"
    parser.add_argument("--minutes", type=float, help=help)
    parser.set_defaults(default_minutes=minutes)
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny; nothing in it is a measurement")


def _complete(args: argparse.Namespace, parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Defaults of the suite that depend on other options."""
    args.minutes = args.minutes or (30 if args.rehearse else args.default_minutes)
    args.phases = args.only.split(",") if args.only else names
    if unknown := set(args.phases) - set(names):
        parser.error(f"--only names {', '.join(sorted(unknown))}; the phases are {', '.join(names)}")
    if args.rehearse and args.out is not None:
        parser.error("--rehearse writes to a temporary folder, never where measurements are; leave --out out")
    args.out = args.out or (Path(tempfile.mkdtemp(prefix="rehearsal-")) if args.rehearse else _ROOT / "build/gpu_suite")


def run_suite(args: argparse.Namespace) -> int:
    from benchmarks.gpu.report import write_report
    from benchmarks.gpu.suite import Suite

    flags = ["--rehearse"] if args.rehearse else ["--model-shape", args.model_shape]
    suite = Suite(args.out, flags, 60 * args.minutes)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # the phases end, too
    suite.say(f"records, logs and report: {args.out}")
    try:
        suite.run([phase for phase in PHASES if phase.name in args.phases])
    finally:
        print(write_report(args.out, suite.results))
    failed = [name for name, result in suite.results.items() if result != "passed"]
    suite.say(f"not passed: {', '.join(failed)}" if failed else "all phases passed")
    return 1 if failed else 0


def run_phase(args: argparse.Namespace) -> None:
    phase = next(phase for phase in PHASES if phase.name == args.phase)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.rehearse and phase.has_kernels:
        os.environ["TRITON_INTERPRET"] = "1"  # chosen when a kernel is defined
    from benchmarks.gpu.session import Session

    session = Session(phase.name, args.out, args.seconds, args.model_shape, args.rehearse)
    getattr(import_module(f"benchmarks.gpu.{phase.module}"), phase.function)(session)


def main() -> int:
    args = parse_args()
    if args.phase is None:
        return run_suite(args)
    run_phase(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
