"""Tables of a matrix: one per task, a summary by task group (`summary`), and accuracy by turn (`turns`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from benchmarks.accuracy.results import FULL
from benchmarks.accuracy.settings import Layout
from benchmarks.footprint import FULL_ATTENTION, TITLE, Footprint, cell
from benchmarks.methods import METHODS
from benchmarks.records import Record
from benchmarks.tables import table as tables
from benchmarks.tables.table import Lines, Row, Table, conditions_of

_KIB = 1024


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Cells of the matrix in the order of context, method, layout and budget; of equal ones the latest."""
    return sorted(tables.rows_of(records, without=["turn"]), key=_order)


def _turns(row: Row) -> dict[int, float]:
    """Score by turn."""
    return {record.params["turn"]: record.value for record in row.records if record.metric == "turn_score"}


def _order(row: Row) -> tuple:
    method = row.params["method"]
    known = list(METHODS).index(method) if method in METHODS else len(METHODS)
    layout = [(str(type(row.params.get(name))), row.params.get(name, 0)) for name in Layout._fields]
    return row.params["context"], known, method, layout, row.params.get("budget", 0)


def varying(rows: Sequence[Row]) -> list[str]:
    """Fields of the layout in which the rows differ; full attention has none."""
    values = {name: {row.params[name] for row in rows if name in row.params} for name in Layout._fields}
    return [name for name, different in values.items() if len(different) > 1]


def table(records: Sequence[Record], name: str) -> Table:
    """A table of this name.

    Parameters
    ----------
    name : a task's, "summary" or "turns"
    """
    rows = rows_of(records)
    lines = {"summary": _summary, "turns": _by_turn}.get(name, lambda rows: _task(rows, name))(rows)
    shown = [record for record in records if record.params["task"] == name] or records
    return Table(lines, conditions_of(shown) if len(lines) > 1 else ())


def _labels(row: Row, fields: Sequence[str]) -> list[str]:
    """Context, method, the fields of the layout, and budget."""
    fields = ("context", "method", *fields, "budget")
    return [str(row.params.get(field, "")) for field in fields]


def _header(fields: Sequence[str]) -> list[str]:
    return ["context", "method", *(field.replace("_", " ") for field in fields), "budget"]


def _task(rows: Sequence[Row], task: str) -> Lines:
    rows = [row for row in rows if row.params["task"] == task]
    fields = varying(rows)
    columns = _of_methods(rows)
    scores = ["score [95 %]", "share of full [95 %]", "recalled KiB/token"]
    lines = [[*_header(fields), *scores, *columns, "tokens/s"]]
    for row in rows:
        score, speed = row.numbers["score"], row.numbers.get("decode_throughput")
        recalled = row.numbers.get("recalled_per_token")
        lines.append(
            [
                *_labels(row, fields),
                _with_interval(score.value, row.numbers["score_high"]),
                "" if score.ratio is None else _with_interval(score.ratio, row.numbers["share_high"]),
                f"{recalled.value / _KIB:,.1f}" if recalled else "",
                *(column([row]) for column in columns.values()),
                f"{speed.value:,.0f}" if speed else "",
            ]
        )
    return lines


def _flagged(rows: Sequence[Row]) -> str:
    """Share of rows that were corrected, the mean over tasks."""
    shares = [row.numbers["flagged_share"].value for row in rows if "flagged_share" in row.numbers]
    return f"{mean(shares):.2f}" if shares else ""


def _footprint(rows: Sequence[Row]) -> str:
    """The mean over tasks; full attention's is known without counting."""
    known = [row.numbers for row in rows if "device_footprint" in row.numbers]
    held = [Footprint(*(numbers[name].value for name in FULL_ATTENTION.records())) for numbers in known]
    return cell([FULL_ATTENTION] if rows[0].params["method"] == FULL else held)


# Title of a column of all tables -> what is in it; shown where a retrieval method has the metric.
_OF_METHODS = {"flagged": ("flagged_share", _flagged), TITLE: ("device_footprint", _footprint)}


def _of_methods(rows: Sequence[Row]) -> dict[str, Callable[[Sequence[Row]], str]]:
    found = {metric for row in rows for metric in row.numbers}
    return {title: column for title, (metric, column) in _OF_METHODS.items() if metric in found}


def _with_interval(value: float, high: Record) -> str:
    return f"{value:.3f} [{high.baseline_value:.3f}, {high.value:.3f}]"


def _summary(rows: Sequence[Row]) -> Lines:
    """Mean over the tasks of each group: score, and share of full attention's mean."""
    fields, groups = varying(rows), list(dict.fromkeys(row.params["group"] for row in rows))
    columns = _of_methods(rows)
    lines = [[*_header(fields), *columns, *groups]]
    for labels, members in group_rows(rows, fields).items():
        line = [*labels, *(column(members) for column in columns.values())]
        for group in groups:
            scores = [row.numbers["score"] for row in members if row.params["group"] == group]
            line.append(_mean(scores))
        lines.append(line)
    return lines


def group_rows(rows: Sequence[Row], fields: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    """Rows of all tasks by context, method, layout and budget."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(_labels(row, fields)), []).append(row)
    return found


def _mean(scores: Sequence[Record]) -> str:
    if not scores:
        return ""
    value, full = mean(score.value for score in scores), [score.baseline_value for score in scores]
    share = f" ({value / mean(full):.1%})" if None not in full and any(full) else ""
    return f"{value:.3f}{share}"


def _by_turn(rows: Sequence[Row]) -> Lines:
    rows = sorted((row for row in rows if _turns(row)), key=lambda row: row.params["task"])
    fields = varying(rows)
    last = max((turn for row in rows for turn in _turns(row)), default=0)
    lines = [["task", *_header(fields), *(f"turn {turn}" for turn in range(1, last + 1))]]
    for row in rows:
        turns = _turns(row)
        scores = [f"{turns[turn]:.3f}" if turn in turns else "" for turn in range(1, last + 1)]
        lines.append([row.params["task"], *_labels(row, fields), *scores])
    return lines


def render(records: Sequence[Record]) -> str:
    """All tables of one run."""
    tasks = dict.fromkeys(record.params["task"] for record in records)
    parts = ["# Accuracy", _NOTE, "## By task group", str(table(records, "summary"))]
    for task in tasks:
        parts += [f"## {task}", str(table(records, task))]
    return "\n\n".join([*parts, "## By turn", str(table(records, "turns"))])


_NOTE = f"""\
Scores are means over references. Brackets: 95 % intervals, by bootstrap over sessions. Shares are of full attention
(`{FULL}`) on the same sessions; by group they are ratios of means over tasks. Recalled: from CPU memory, per generated
token, where the device holds two windows of the largest budget for each request. Flagged: share of the rows over their
budget that were corrected. KV footprint: tokens that are held in decode steps, relative to full attention. Tokens/s:
decoding, of the batch."""
