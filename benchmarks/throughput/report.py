"""Tables and pictures of the throughput suite.

    python -m benchmarks.throughput.report benchmarks/README.md

fills `<!-- throughput FILE TABLE -->` ... `<!-- end -->` from benchmarks/results/FILE.jsonl, where TABLE is a phase
(traffic, series, memory, ablation), `goals` or `summary`, and draws the pictures beside the records.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.records import RESULTS, Record, fill_marked, read_records, render_lines, sources, verdict
from benchmarks.throughput.goals import report_goals
from benchmarks.throughput.measure import LATENCIES, PERCENTILES
from benchmarks.throughput.setups import PLAIN
from benchmarks.throughput.workloads import ABLATION, SERIES

_MIB, _KIB = 1 << 20, 1 << 10


class Row(NamedTuple):
    """A workload on a server: what was run, and its records by metric."""

    params: dict[str, Any]
    numbers: dict[str, Record]


class Column(NamedTuple):
    """Metrics that share a cell, in some unit."""

    title: str
    metrics: tuple[str, ...]
    scale: float = 1.0
    digits: int | None = None  # behind the point; None: three significant ones

    def cell(self, number: Callable[[Record], float | None], row: Row) -> str:
        values = [number(row.numbers[metric]) for metric in self.metrics if metric in row.numbers]
        return " / ".join(self._format(value) for value in values if value is not None)

    def _format(self, value: float) -> str:
        value /= self.scale
        if self.digits is not None:
            return f"{value:.{self.digits}f}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    def ratio(self, row: Row) -> str:
        """Ratio to plain SGLang, of percentiles the first, a loss marked."""
        record = row.numbers.get(self.metrics[0])
        if record is None or record.ratio is None:
            return ""
        ratio = f"{record.ratio:.2f}"
        return ratio + " **loss**" * (ratio != "1.00" and verdict(record) == "**loss**")


_SPEED = (
    Column("requests/s", ("request_throughput",)),
    Column("output tokens/s", ("output_throughput",)),
    Column("all tokens/s", ("total_throughput",)),
    Column("decoding alone, tokens/s", ("decode_throughput",)),
)
_LATENCY = tuple(
    Column(f"{name.upper()} ms {'/'.join(PERCENTILES)}", tuple(f"{name}_{p}" for p in PERCENTILES))
    for name in LATENCIES
)
_MEMORY = (
    Column("device MiB", ("device_bytes",), _MIB),
    Column("host MiB", ("host_bytes",), _MIB),
)
_RECALLED = Column("recalled KiB/token", ("recalled_per_token",), _KIB)
_RUN = (
    Column("finished", ("finished",), digits=2),
    Column("most at once", ("peak_concurrency",)),
    *_SPEED,
    *_LATENCY,
    *_MEMORY,
    Column("prefix hits", ("prefix_hit_rate",), digits=2),
    _RECALLED,
    Column("equal answers", ("equal_outputs",), digits=2),
)
_SETTING = (
    _SPEED[3],
    *_LATENCY[:2],
    _MEMORY[0],
    _RECALLED,
    Column("selected KiB/token", ("selected_per_token",), _KIB),
    Column("already on the device", ("hit_share",), digits=2),
    Column("corrected", ("corrected_rows",), digits=2),
)
_SUMMARY = (_SPEED[0], _SPEED[3], *_LATENCY[:2], _RUN[1], _MEMORY[0])


def rows_of(records: Sequence[Record]) -> list[Row]:
    """One row for each workload and server, in the order of the records; of equal ones the latest."""
    found: dict[str, Row] = {}
    for record in records:
        key = json.dumps(record.params, sort_keys=True)
        found.setdefault(key, Row(record.params, {})).numbers[record.metric] = record
    return list(found.values())


def table(records: Sequence[Record], name: str) -> str:
    """A phase's table, the goals or a summary, and below it what it was measured on."""
    records = [record for record in records if _is_shown(record, name)]
    if not records:
        return "No records yet.\n"
    if name == "goals":
        return "".join(f"- {line}\n" for line in report_goals(records).splitlines())
    lines = {ABLATION: _settings, "summary": _summary}.get(name, _runs)(rows_of(records))
    return f"{render_lines(_aligned(lines))}\n{sources(records)}"


def _is_shown(record: Record, name: str) -> bool:
    """Whether a table is about a record; a summary has only the lengths of the series, and no ablations."""
    phase, workload = record.params["phase"], record.params["workload"]
    if name == "summary":
        return workload == "context" if phase == SERIES else phase != ABLATION
    return name in ("goals", phase)


def _runs(rows: Sequence[Row]) -> list[list[str]]:
    """Three lines for each workload: plain SGLang, FreeKV, ratio. Columns without a number are left out."""
    columns = [column for column in _RUN if any(column.metrics[0] in row.numbers for row in rows)]
    lines = [["workload", "longest prompt", "server", *(column.title for column in columns)]]
    for row in rows:
        labels = [f"{row.params['workload']}, {row.params['requests']} requests", f"{row.params['context']:,}"]
        plain = [column.cell(lambda record: record.baseline_value, row) for column in columns]
        ours = [column.cell(lambda record: record.value, row) for column in columns]
        lines += [[*labels, PLAIN, *plain], ["", "", row.params["setup"], *ours]]
        lines.append(["", "", "ratio", *(column.ratio(row) for column in columns)])
    return lines


def _summary(rows: Sequence[Row]) -> list[list[str]]:
    """Ratios to plain SGLang, a line for each workload."""
    titles = [column.title.partition(" ms")[0].removesuffix(" MiB") for column in _SUMMARY]
    lines = [["workload", "requests", "longest prompt", *titles]]
    for row in rows:
        labels = [row.params["workload"], str(row.params["requests"]), f"{row.params['context']:,}"]
        lines.append([*labels, *(column.ratio(row) for column in _SUMMARY)])
    return lines


def _settings(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each setting."""
    speed = _SETTING[0]
    lines = [["setting", "budget", *(column.title for column in _SETTING), "decoding: times plain"]]
    plain = [column.cell(lambda record: record.baseline_value, rows[0]) for column in _SETTING]
    lines.append([PLAIN, "", *plain, ""])
    for row in rows:
        ours = [column.cell(lambda record: record.value, row) for column in _SETTING]
        lines.append([row.params["setup"], str(row.params["budget"]), *ours, speed.ratio(row)])
    return lines


def _aligned(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Cells padded to the width of their column, and the line below the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    header, *body = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return [header, ["-" * width for width in widths], *body]


def main() -> None:
    from benchmarks.throughput.pictures import draw

    parser = argparse.ArgumentParser(description="Fill the marked throughput tables of markdown files from records.")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--records", type=Path, default=RESULTS / "throughput.jsonl", help="of the pictures")
    args = parser.parse_args()
    for path in args.files:
        path.write_text(fill_marked(path.read_text(), "throughput", table))
    if args.records.exists():
        for path in draw(read_records(args.records), args.records.parent):
            print(path)


if __name__ == "__main__":
    main()
