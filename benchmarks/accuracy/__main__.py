"""Accuracy of the methods on the tasks: every setting is a server, one after the other, with the same sessions.

    python -m benchmarks.accuracy --tasks single copy --contexts 16384 --budgets 512 1024 --count 16 --resume

A batch of sessions is played turn by turn, `--concurrency` at once, with each budget in ascending order; its line in
OUT/sessions.jsonl is written when it ends. With --resume a run goes on after the lines that are there. At the end all
lines are put together: records, OUT/report.md and pictures.

Retrieval servers first read each document into the prefix cache, so that their counters are about decoding; what the
requests before have left on the device stays there. Plain SGLang's attention on a CPU computes the whole prefix again
where the cache has it, so there a document is read once, with its request. Tokens per second count from the moment when
every request of a batch has its first token. Sessions of several turns have a part of the prefix cache for each budget,
so that no turn reads the KV that another budget has decoded.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy import results
from benchmarks.accuracy.matrix import Launcher, Matrix, draw_batches
from benchmarks.accuracy.settings import Layout, settings
from benchmarks.accuracy.tasks import TASKS
from benchmarks.methods import METHODS, parse_method
from benchmarks.needle import MODEL
from benchmarks.records import RESULTS, ROOT, RecordWriter

BUILD = ROOT / "build" / "accuracy"


def run(args: argparse.Namespace) -> None:
    from benchmarks.accuracy.pictures import draw
    from benchmarks.accuracy.report import render

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # the servers end, too
    file = args.out / "sessions.jsonl"
    if file.exists() and not args.resume:
        sys.exit(f"{file} exists: go on with --resume, or choose another --out, or remove it")
    tasks = [TASKS[name] for name in args.tasks]
    batches = draw_batches(tasks, args.contexts, args.count, args.seed, args.concurrency)
    longest = max(session.context for batch in batches for session in batch.sessions)
    more = tuple(args.server_flags)
    launcher = Launcher(args.model, longest, args.concurrency, args.seed, args.out / "logs", more)
    matrix = Matrix(file, launcher.start, launcher.digest)
    cells = results.summarize(matrix.run(args.settings, batches, args.servers), args.seed)
    writer = RecordWriter("accuracy", args.records)
    records = results.write_records(cells, writer)
    (args.out / "report.md").write_text(render(records))
    draw(records, args.out)
    print(f"{args.out / 'report.md'}, pictures beside it, records in {args.records}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, layout = parser.add_argument, Layout()
    known = f"of {', '.join(METHODS)}, or NAME=FLAGS for another"
    ours = [name for name, method in METHODS.items() if not method.is_rival]
    add("--methods", nargs="+", default=ours, help=f"{known} (default: {', '.join(ours)})")
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    add("--contexts", type=int, nargs="+", default=[4096, 16384], help="tokens of prompt and answer")
    add("--budgets", type=int, nargs="+", default=[512, 1024, 2048], help="tokens")
    add("--count", type=int, default=16, help="sessions of each task and context")
    add("--page-sizes", type=int, nargs="+", default=[layout.page_size], help="tokens")
    add("--poolings", nargs="+", default=[layout.pooling], help="of a group's scores")
    add("--key-bits", type=int, nargs="+", default=[layout.key_bits], help="of the codes that pages are scored by")
    add("--sink", type=int, default=layout.sink, help="tokens")
    add("--recent", type=int, default=layout.recent, help="tokens")
    add("--dense-layers", default=layout.dense_layers, help='like the flag, "0,1"')
    add("--seed", type=int, default=42, help="of the sessions")
    add("--concurrency", type=int, default=4, help="sessions at once")
    add("--servers", type=int, default=1, help="at a time; with more than one, tokens/s say little")
    add("--model", type=Path, default=MODEL)
    add("--out", type=Path, default=BUILD, help="folder of session lines, logs, report and pictures")
    add("--records", type=Path, default=RESULTS / "accuracy.jsonl", help="file of the records")
    add("--resume", action="store_true", help="go on after the lines that OUT has")
    add("server_flags", nargs="*", help="after --: more flags for every server")
    args = parser.parse_args(argv)
    layouts = [
        Layout(page_size, pooling, args.sink, args.recent, args.dense_layers, key_bits)
        for page_size in args.page_sizes
        for pooling in args.poolings
        for key_bits in args.key_bits
    ]
    try:
        args.settings = settings([parse_method(text) for text in args.methods], layouts, args.budgets)
    except ValueError as error:
        parser.error(str(error))
    if not (args.model / "config.json").exists():
        parser.error(f"{args.model} has no config.json; train the model (make train-model), or give --model")
    return args


if __name__ == "__main__":
    run(parse_args())
