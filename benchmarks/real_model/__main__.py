"""Decode real text under retrieval and under full attention, and say what each method loses and moves.

    python -m benchmarks.real_model
    python -m benchmarks.real_model --model FOLDER --contexts 2048 4096 8064 --budgets 256 512 1024 2048
    python -m benchmarks.real_model --kinds book.txt --methods exact "mine=--freekv-tau 0.5"

The first runs most methods at 4,096 tokens with a budget of 512, on SmolLM2.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from benchmarks.methods import METHODS, Method, parse_method
from benchmarks.real_model import pictures
from benchmarks.real_model.compare import Comparison
from benchmarks.real_model.job import PAGE, TAIL, Cell, Job, whole_pages
from benchmarks.real_model.processes import run_in_process
from benchmarks.real_model.progress import Progress
from benchmarks.real_model.summary import WHOLE, table, write_drift, write_full, write_records
from benchmarks.real_model.texts import KINDS, Text, digest, draw_texts, fetch_data
from benchmarks.real_model.worker import read_full, read_methods, share_processes
from benchmarks.records import RESULTS, RecordWriter, read_records
from benchmarks.suites.packages import NotInstalled
from tools.pretrained import NotFetched, smollm2_folder

DEFAULT_METHODS = [
    WHOLE,
    "exact",
    "freekv-0.9",
    "mass",
    "mass-0.5",
    "freekv-paper",
    "quest",
    "speculation",
    "one-time",
    "r-kv",
    "corm",
    "window",
]


def main() -> int:
    """Return 1, with a sentence, where nothing can be run as asked."""
    args = _parse()
    # A server leaves a core to its other processes; here is one process at a time.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    try:
        job, texts, cells = _prepare(args)
    except (NotFetched, NotInstalled, OSError, ValueError) as why:
        print(f"real_model: {why}", file=sys.stderr)
        return 1
    writer = RecordWriter("real_model", args.out / f"{args.name}.jsonl")
    shared = {"model": Path(args.model).name, "dtype": args.dtype, "texts": digest(texts), "steps": args.steps}
    shared["windows"] = args.windows
    with tempfile.TemporaryDirectory() as folder:
        job = dataclasses.replace(job, folder=Path(folder))
        contexts: set[int] = set()
        drift_of = ("exact", max(args.contexts), min(args.budgets))
        for comparison in _compare(job, cells):
            _write(comparison, texts, writer, shared, drift_of, is_first=comparison.context not in contexts)
            contexts.add(comparison.context)
    _show(args, writer.path)
    return 0


def _prepare(args: argparse.Namespace) -> tuple[Job, list[Text], list[Cell]]:
    """Fetch what is missing, and check what is asked for; raises what `main` catches."""
    cells = _cells([parse_method(name) for name in args.methods if name != WHOLE], args)
    share_processes(cells)  # checks the settings of each
    for context in args.contexts:
        if context % PAGE or context <= TAIL:
            raise ValueError(f"--contexts {context}: give multiples of {PAGE} tokens, more than {TAIL}")
    args.model = args.model or smollm2_folder()
    job, longest = _job(args), AutoConfig.from_pretrained(args.model).max_position_embeddings
    if job.num_tokens > longest:
        raise ValueError(
            f"--contexts {max(args.contexts)} and --steps {args.steps} are {job.num_tokens} tokens, and the model is "
            f"for {longest}; give at most --contexts {(longest - args.steps - 1) // PAGE * PAGE}"
        )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = draw_texts(args.kinds, args.texts, job.num_tokens, tokenizer, args.data or fetch_data(args.kinds))
    return dataclasses.replace(job, texts=tuple(tuple(text.tokens) for text in texts)), texts, cells


def _compare(job: Job, cells: list[Cell]):
    """Yield the comparison of every cell."""
    groups = share_processes(cells)
    progress = Progress(
        prefill=(1 + len(groups)) * len(job.texts) * job.num_tokens,
        decode=(len(job.contexts) + len(cells)) * len(job.texts) * job.num_steps,
    )
    for work in run_in_process(read_full, job):
        progress.add(work)
    for group in groups:
        for item in run_in_process(read_methods, job, group):
            if isinstance(item, Comparison):
                progress.say(f"{item.method}, {item.budget:,} of {item.context:,}: KL {item.of_texts('kl').mean():.4f}")
                yield item
            else:
                progress.add(item)


def _cells(methods: list[Method], args: argparse.Namespace) -> list[Cell]:
    """Behind each context every method with the budgets that do not cover it, and one that does."""
    whole = [Method(WHOLE, ("--freekv-tau", "-1"))] if WHOLE in args.methods else []
    cells = []
    for context in args.contexts:
        budgets = [budget for budget in args.budgets if budget < context]
        cells += [Cell(method, context, whole_pages(context + args.steps)) for method in whole]
        cells += [Cell(method, context, budget) for budget in budgets for method in methods]
    return cells


def _write(
    comparison: Comparison, texts: list[Text], writer: RecordWriter, shared: dict, drift_of: tuple, is_first: bool
) -> None:
    kinds = [text.kind for text in texts]
    if is_first:
        write_full(comparison, kinds, writer, shared)
    write_records(comparison, kinds, writer, shared)
    if (comparison.method, comparison.context, comparison.budget) == drift_of:
        write_drift(comparison, kinds, writer, shared)


def _show(args: argparse.Namespace, path: Path) -> None:
    records = read_records(path)
    for context in args.contexts:
        for budget in args.budgets:
            if budget < context:
                print(f"\n{context:,} tokens, budget {budget:,}; brackets: 95 % intervals over texts")
                print(table(records, f"{context}:{budget}").text())
    print(*pictures.draw(records, args.out, args.name), sep="\n")


def _job(args: argparse.Namespace) -> Job:
    return Job(
        model=str(args.model),
        dtype=args.dtype,
        device=args.device,
        texts=(),
        contexts=tuple(args.contexts),
        num_steps=args.steps,
        every=args.every,
        windows=args.windows,
        folder=Path(),
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [WHOLE, *(name for name, method in METHODS.items() if not method.is_full)]
    parser.add_argument("--model", type=Path, default=None, help="folder of a model (default: SmolLM2, fetched once)")
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, help=f"of {', '.join(names)}, or NAME=FLAGS")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096], help="tokens of the prompts, whole pages")
    parser.add_argument("--budgets", type=int, nargs="+", default=[512], help="tokens")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help=f"of {', '.join(KINDS)}, or text files")
    parser.add_argument("--texts", type=int, default=4, help="of each kind")
    parser.add_argument("--steps", type=int, default=64, help="decode steps of each text")
    parser.add_argument("--every", type=int, default=16, help="steps of which one looks at exact attention")
    parser.add_argument("--windows", type=float, default=2.0, help="device blocks for each request, in windows")
    parser.add_argument("--dtype", default="float32", help="float32: rounding hides no small difference")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--data", type=Path, default=None, help="folder of the texts (default: fetched once)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records and pictures")
    parser.add_argument("--name", default="real_model", help="stem of the file of records")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
