"""Tables of the throughput suite: one per phase, the goals (`goals`), and the ratios of all of it (`summary`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.footprint import FULL_ATTENTION, TITLE
from benchmarks.goals import goals_table
from benchmarks.records import Record, verdict
from benchmarks.tables.table import Lines, Row, Table, conditions_of, number, rows_of
from benchmarks.throughput.goals import goals_of
from benchmarks.throughput.measure import LATENCIES, PERCENTILES
from benchmarks.throughput.setups import PLAIN
from benchmarks.throughput.workloads import ABLATION, SERIES

_MIB, _KIB = 1 << 20, 1 << 10
OF_ROUNDS = "†"  # after a ratio: the median of the rounds' ratios, where the quotient of the medians is another


class Column(NamedTuple):
    """Metrics that share a cell, in some unit."""

    title: str
    metrics: tuple[str, ...]
    scale: float = 1.0
    digits: int | None = None  # behind the point; None: three significant ones

    def cell(self, value_of: Callable[[Record], float | None], row: Row) -> str:
        values = [value_of(row.numbers[metric]) for metric in self.metrics if metric in row.numbers]
        return " / ".join(self._format(value / self.scale) for value in values if value is not None)

    def _format(self, value: float) -> str:
        return number(value) if self.digits is None else f"{value:.{self.digits}f}"

    def ratio(self, row: Row) -> str:
        """Ratio to plain SGLang, of percentiles the first; a loss is marked, and what is no quotient of the medians."""
        record = row.numbers.get(self.metrics[0])
        if record is None or record.ratio is None:
            return ""
        ratio = f"{record.ratio:.2f}"
        is_of_rounds = ratio != f"{record.value / record.baseline_value:.2f}"
        is_loss = ratio != "1.00" and verdict(record) == "**loss**"
        return ratio + OF_ROUNDS * is_of_rounds + " **loss**" * is_loss


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
_FOOTPRINT = Column(TITLE, tuple(FULL_ATTENTION.records()), digits=2)
_RECALLED = Column("recalled KiB/token", ("recalled_per_token",), _KIB)
_RUN = (
    Column("finished", ("finished",), digits=2),
    Column("most at once", ("peak_concurrency",)),
    *_SPEED,
    *_LATENCY,
    *_MEMORY,
    _FOOTPRINT,
    Column("prefix hits", ("prefix_hit_rate",), digits=2),
    _RECALLED,
    Column("equal answers", ("equal_outputs",), digits=2),
)
_SETTING = (
    _SPEED[3],
    *_LATENCY[:2],
    _MEMORY[0],
    _FOOTPRINT,
    _RECALLED,
    Column("selected KiB/token", ("selected_per_token",), _KIB),
    Column("already on the device", ("hit_share",), digits=2),
    Column("corrected", ("corrected_rows",), digits=2),
)
_SUMMARY = (
    *(_SPEED[0], _SPEED[3], *_LATENCY[:2], _RUN[1], _MEMORY[0]),
    Column("KV footprint on the device", _FOOTPRINT.metrics[:1]),
)

_BRIEF = (
    Column("at once", ("peak_concurrency",)),
    Column("requests/s", ("request_throughput",)),
    Column("tokens/s", ("output_throughput",)),
    Column("decoding", ("decode_throughput",)),
    Column("first ms", ("ttft_p50",)),
    Column("next ms", ("tpot_p50",)),
    Column("MiB", ("device_bytes",), _MIB),
    Column("KV held", _FOOTPRINT.metrics, digits=2),
    Column("recalled", ("recalled_per_token",), _KIB),
)


def table(records: Sequence[Record], name: str) -> Table:
    """A phase's table, the goals or a summary."""
    records = [record for record in records if _is_shown(record, name)]
    if name == "goals" and records:
        return goals_table(goals_of(records))
    if not records:
        return Table([])
    rows = rows_of(records)
    render = {ABLATION: _settings, "summary": _summary}.get(name, _runs)
    return Table(render(rows), conditions_of(records))


def brief(records: Sequence[Record], phase: str) -> Table:
    """A phase's table for a terminal: medians, and lines that fit in it."""
    rows = rows_of(record for record in records if record.params["phase"] == phase)
    columns = _shown(_BRIEF, rows)
    if phase == ABLATION:
        columns = [column for column in columns if column not in _BRIEF[:3]]  # of all settings about the same
        return Table([[cell.replace("**", "") for cell in line] for line in _settings(rows, columns)])
    lines = [["workload", "server", *(column.title for column in columns)]]
    for row in rows:
        for name, (server, *cells) in zip((label(row), "", ""), _compared(row, columns), strict=True):
            lines.append([name, server, *(cell.replace("**", "") for cell in cells)])
    return Table(lines)


def label(row: Row) -> str:
    return f"{row.params['workload']}, {row.params['requests']} x {row.params['context']:,}"


def _is_shown(record: Record, name: str) -> bool:
    """Whether a table is about a record; a summary has only the lengths of the series, and no ablations."""
    phase, workload = record.params["phase"], record.params["workload"]
    if name == "summary":
        return workload == "context" if phase == SERIES else phase != ABLATION
    return name in ("goals", phase)


def _runs(rows: Sequence[Row]) -> Lines:
    """Three lines for each workload: plain SGLang, FreeKV, ratio."""
    columns = _shown(_RUN, rows)
    lines = [["workload", "longest prompt", "server", *(column.title for column in columns)]]
    for row in rows:
        labels = [f"{row.params['workload']}, {row.params['requests']} requests", f"{row.params['context']:,}"]
        lines += [
            [*names, *line] for names, line in zip((labels, ["", ""], ["", ""]), _compared(row, columns), strict=True)
        ]
    return lines


def _shown(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Columns that have a number."""
    return [column for column in columns if any(column.metrics[0] in row.numbers for row in rows)]


def _compared(row: Row, columns: Sequence[Column]) -> Iterator[list[str]]:
    """Plain SGLang's cells, FreeKV's and the ratios, each after its name."""
    yield [PLAIN, *(column.cell(lambda record: record.baseline_value, row) for column in columns)]
    yield [row.params["setup"], *(column.cell(lambda record: record.value, row) for column in columns)]
    yield ["ratio", *(column.ratio(row) for column in columns)]


def _summary(rows: Sequence[Row]) -> Lines:
    """Ratios to plain SGLang, a line for each workload."""
    columns = _shown(_SUMMARY, rows)
    titles = [column.title.partition(" ms")[0].removesuffix(" MiB") for column in columns]
    lines = [["workload", "requests", "longest prompt", *titles]]
    for row in rows:
        labels = [row.params["workload"], str(row.params["requests"]), f"{row.params['context']:,}"]
        lines.append([*labels, *(column.ratio(row) for column in columns)])
    return lines


def _settings(rows: Sequence[Row], columns: Sequence[Column] = _SETTING) -> Lines:
    """A line for each setting."""
    speed, columns = _SPEED[3], _shown(columns, rows)
    lines = [["setting", "budget", *(column.title for column in columns), "decoding: times plain"]]
    lines.append([PLAIN, "", *(column.cell(lambda record: record.baseline_value, rows[0]) for column in columns), ""])
    for row in rows:
        ours = [column.cell(lambda record: record.value, row) for column in columns]
        lines.append([row.params["setup"], str(row.params["budget"]), *ours, speed.ratio(row)])
    return lines
