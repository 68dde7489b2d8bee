"""Benchmark records: one JSON line per number, and the markdown tables that are made from them.

    python -m benchmarks.records benchmarks/README.md

rewrites what stands between two markers of the named files:

    <!-- records programs batch_time -->
    <!-- end -->

is filled with a table of that metric in benchmarks/results/programs.jsonl. Of several records with the same
parameters the latest counts. A ratio that is worse than the baseline is marked as a loss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

_MORE_IS_BETTER = {"tokens/s", "GB/s", "requests/s", "requests"}
_LESS_IS_BETTER = {"s", "ms", "bytes"}


@dataclass(frozen=True)
class Record:
    """One measured number. Everything needed to judge it and to measure it again."""

    name: str  # the benchmark; also the stem of its file
    params: dict[str, int | float | str]
    metric: str
    value: float
    unit: str
    baseline: str | None  # what the value is compared with, None where nothing is
    baseline_value: float | None  # in the same unit
    ratio: float | None  # value / baseline_value, unless the benchmark pairs its measurements
    commit: str  # with "-dirty" where the working tree differs from it
    environment: dict[str, int | float | str | None]
    command: str
    time: str  # UTC, ISO 8601


@dataclass
class RecordWriter:
    """Appends records of one run to a file. Commit and environment are read once, when the run starts."""

    name: str
    path: Path
    commit: str = field(default_factory=lambda: describe_commit())
    environment: dict = field(default_factory=lambda: describe_environment())
    module: str = ""  # that was run, where it is not the one in `benchmarks` of that name

    def write(
        self,
        metric: str,
        value: float,
        unit: str,
        params: dict[str, int | float | str],
        *,
        baseline: str | None = None,
        baseline_value: float | None = None,
        ratio: float | None = None,
    ) -> Record:
        """Append one record; the ratio is computed where it is not given.

        Raises
        ------
        ValueError
            If only one of `baseline` and `baseline_value` is given.
        """
        if (baseline is None) != (baseline_value is None):
            raise ValueError(f"baseline and its value belong together, got {baseline!r} and {baseline_value!r}")
        if ratio is None and baseline_value:
            ratio = value / baseline_value
        record = Record(
            name=self.name,
            params=params,
            metric=metric,
            value=value,
            unit=unit,
            baseline=baseline,
            baseline_value=baseline_value,
            ratio=ratio,
            commit=self.commit,
            environment=self.environment,
            command=shlex.join(["python", "-m", self.module or f"benchmarks.{self.name}", *sys.argv[1:]]),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        return record


def read_records(path: Path) -> list[Record]:
    """Read a file of records.

    Raises
    ------
    ValueError
        If a line does not have exactly the fields of a record.
    """
    names = {f.name for f in fields(Record)}
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        values = json.loads(line)
        if set(values) != names:
            wrong = ", ".join(sorted(set(values) ^ names))
            raise ValueError(f"{path}:{number}: missing or unknown fields: {wrong}; write it with RecordWriter")
        records.append(Record(**values))
    return records


def describe_commit() -> str:
    """The commit of the working tree, "-dirty" appended where it differs; results do not count."""
    commit = _git("rev-parse", "--short=12", "HEAD") or "uncommitted"
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/README.md")
    return f"{commit}-dirty" if changes else commit


def _git(*args: str) -> str:
    """What git prints; empty where there is no repository, or no commit yet."""
    result = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def describe_environment() -> dict[str, int | float | str | None]:
    """The machine and the versions that a number depends on."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "sglang", "sglang-freekv")},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def render_table(records: Iterable[Record]) -> str:
    """One markdown table of records of one metric, and below it what they were measured on."""
    latest = {json.dumps(r.params, sort_keys=True): r for r in records}.values()
    if not latest:
        return "No records yet.\n"
    columns = list(dict.fromkeys(name for r in latest for name in r.params))
    baseline = next((r.baseline for r in latest if r.baseline), None)
    unit, metric = next((r.unit, r.metric) for r in latest)
    header = [*columns, f"{metric.replace('_', ' ')} ({unit})"] + ([baseline, "ratio", ""] if baseline else [])
    lines = [header, ["---"] * len(header)]
    for r in latest:
        cells = [str(r.params.get(name, "")) for name in columns] + [_number(r.value)]
        if baseline:
            cells += [_number(r.baseline_value), f"{r.ratio:.2f}" if r.ratio else "", verdict(r)]
        lines.append(cells)
    return f"{render_lines(lines)}\n{sources(latest)}"


def render_lines(lines: Iterable[Iterable[str]]) -> str:
    """Lines of cells as markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sources(records: Iterable[Record]) -> str:
    """What records were measured on and with, a line each."""
    return "".join(f"{line}\n" for line in dict.fromkeys(_source(r) for r in records))


def _source(record: Record) -> str:
    return f"{_machine(record.environment)}; commit {record.commit}; `{record.command}`"


def _number(value: float | None) -> str:
    """Three significant digits, thousands divided."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def verdict(record: Record) -> str:
    """ "win" or "**loss**" against the baseline; empty where the unit does not say which it is."""
    if record.ratio in (None, 1) or record.unit not in _MORE_IS_BETTER | _LESS_IS_BETTER:
        return ""
    return "win" if (record.ratio > 1) == (record.unit in _MORE_IS_BETTER) else "**loss**"


def _machine(environment: dict) -> str:
    cpu = f"{environment['gpu'] or environment['cpu']}, {environment['cores']} cores"
    return f"{cpu}, torch {environment['torch']}, sglang {environment['sglang']}"


def fill_tables(text: str, results: Path = RESULTS) -> str:
    """Rewrite every marked table of a markdown text."""

    def render(records: list[Record], metric: str) -> str:
        return render_table(r for r in records if r.metric == metric)

    return fill_marked(text, "records", render, results)


def fill_marked(text: str, kind: str, render: Callable[[list[Record], str], str], results: Path = RESULTS) -> str:
    """Rewrite what stands between ``<!-- kind FILE TABLE -->`` and ``<!-- end -->`` with ``render(records, TABLE)``."""
    marked = re.compile(rf"(<!-- {kind} (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

    def table(match: re.Match) -> str:
        path = results / f"{match[2]}.jsonl"
        records = read_records(path) if path.exists() else []
        return match[1] + render(records, match[3]) + match[4]

    return marked.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill the marked tables of markdown files from records.")
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args().files:
        path.write_text(fill_tables(path.read_text()))


if __name__ == "__main__":
    main()
