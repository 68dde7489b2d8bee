"""Renew every table that is made from records: benchmarks/README.md and benchmarks/results/*.md.

python -m benchmarks.tables [--pictures] [FILE.md ..]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.accuracy import report as accuracy
from benchmarks.cost_model import report as cost_model
from benchmarks.cost_model.results import read_run
from benchmarks.real_model import summary as real_model
from benchmarks.records import RESULTS, Record, read_records
from benchmarks.suites import report as suites
from benchmarks.tables.kinds import every_metric, one_metric, pivot
from benchmarks.tables.marked import fill
from benchmarks.throughput import report as throughput

KINDS = {
    "records": one_metric,
    "metrics": every_metric,
    "pivot": pivot,
    "accuracy": accuracy.table,
    "suites": suites.table,
    "throughput": throughput.table,
    "cost_model": cost_model.table,
    "real_model": real_model.table,
}


def documents() -> list[Path]:
    """The files that have marked tables."""
    return [RESULTS.parent / "README.md", *sorted(RESULTS.glob("*.md"))]


def draw() -> list[Path]:
    """Draw again every committed picture that is made from records."""
    from benchmarks.accuracy import pictures as accuracy_pictures
    from benchmarks.cost_model import picture as cost_model_picture
    from benchmarks.real_model import pictures as real_model_pictures
    from benchmarks.throughput import pictures as throughput_pictures

    def records(name: str) -> list[Record]:
        return read_records(RESULTS / f"{name}.jsonl")

    cost = RESULTS / "cost_model.png"
    cost_model_picture.draw(read_run(records("cost_model")), cost)
    against_budget = accuracy_pictures.draw(records("accuracy_budgets"), RESULTS, stem="accuracy_")
    real_model = real_model_pictures.draw(records("real_model_budgets"), RESULTS)
    return [cost, *against_budget, *real_model, *throughput_pictures.draw(records("throughput"), RESULTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", action="store_true", help="draw the pictures of results/ again, too")
    parser.add_argument("files", type=Path, nargs="*", help="markdown files (default: README.md and results/*.md)")
    args = parser.parse_args()
    for path in args.files or documents():
        before = path.read_text()
        after = fill(before, KINDS)
        path.write_text(after)
        print(f"{path}: {'as it was' if after == before else 'renewed'}")
    if args.pictures:
        print(*draw(), sep="\n")


if __name__ == "__main__":
    main()
