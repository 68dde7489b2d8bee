"""Renew every table that is made from records: benchmarks/README.md and benchmarks/results/*.md.

python -m benchmarks.tables [FILE.md ..]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.accuracy import report as accuracy
from benchmarks.cost_model import report as cost_model
from benchmarks.records import RESULTS
from benchmarks.tables.kinds import every_metric, one_metric, pivot
from benchmarks.tables.marked import fill
from benchmarks.throughput import report as throughput

KINDS = {
    "records": one_metric,
    "metrics": every_metric,
    "pivot": pivot,
    "accuracy": accuracy.table,
    "throughput": throughput.table,
    "cost_model": cost_model.table,
}


def documents() -> list[Path]:
    """The files that have marked tables."""
    return [RESULTS.parent / "README.md", *sorted(RESULTS.glob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", help="markdown files (default: README.md and results/*.md)")
    for path in parser.parse_args().files or documents():
        before = path.read_text()
        after = fill(before, KINDS)
        path.write_text(after)
        print(f"{path}: {'as it was' if after == before else 'renewed'}")


if __name__ == "__main__":
    main()
