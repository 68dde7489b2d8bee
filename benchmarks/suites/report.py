"""Tables of the suites: tasks with scores, a summary of them, numbers beside plain SGLang's, tests; losses marked."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from benchmarks.records import Record, verdict
from benchmarks.tables.table import Lines, Row, Table, conditions_of, latest, number, rows_of

SCORED = ("ruler", "lm_eval")
LOSS = "**loss**"
_KIB = 1024


def table(records: Sequence[Record], name: str) -> Table:
    """A table of this name.

    Parameters
    ----------
    name : a suite's, or "summary" over the suites with scores
    """
    shown = [r for r in records if r.params["suite"] in (SCORED if name == "summary" else (name,))]
    lines = {"summary": _summary, "kits": _kits}.get(name, _tasks if name in SCORED else _numbers)(shown)
    return Table(lines, conditions_of(latest(shown)) if len(lines) > 1 else ())


def _methods(records: Sequence[Record]) -> list[Row]:
    """Rows of everything but full attention, which is in their baselines."""
    return [row for row in rows_of(records) if "budget" in row.params]


def _tasks(records: Sequence[Record]) -> Lines:
    header = ["context", "task", "samples", "method", "budget", "full", "score [95 %]", "share of full [95 %]"]
    lines = [[*header, "equal answers", "recalled KiB/token", "corrected rows", ""]]
    for row in _methods(records):
        score, found = row.numbers["score"], row.numbers
        share = "" if score.ratio is None else _interval(score.ratio, found["share_high"])
        names = ("context", "task", "samples", "method", "budget")
        lines.append(
            [
                *(str(row.params[name]) for name in names),
                f"{score.baseline_value:.3f}",
                _interval(score.value, found["score_high"]),
                share,
                f"{found['equal_answers'].value:.2f}",
                f"{found['recalled_per_token'].value / _KIB:,.0f}",
                f"{found['corrected_rows'].value:.2f}",
                LOSS if score.value < score.baseline_value else "",
            ]
        )
    return lines


def _interval(value: float, high: Record) -> str:
    return f"{value:.3f} [{high.baseline_value:.3f}, {high.value:.3f}]"


def _summary(records: Sequence[Record]) -> Lines:
    """A line for each suite, context and method: means over tasks, and on how many of them full attention scores."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in _methods(records):
        labels = tuple(str(row.params[name]) for name in ("suite", "context", "method", "budget"))
        groups.setdefault(labels, []).append(row)
    header = ["suite", "context", "method", "budget", "tasks", "full above 0", "full", "score", "share of full"]
    lines = [[*header, "equal answers", "tasks better", "tasks worse"]]
    for labels, rows in groups.items():
        scores = [row.numbers["score"] for row in rows]
        full, ours = mean(score.baseline_value for score in scores), mean(score.value for score in scores)
        lines.append(
            [
                labels[0].replace("_", "-"),
                *labels[1:],
                str(len(rows)),
                str(sum(score.baseline_value > 0 for score in scores)),
                f"{full:.3f}",
                f"{ours:.3f}",
                f"{ours / full:.1%}" if full else "",
                f"{mean(row.numbers['equal_answers'].value for row in rows):.2f}",
                str(sum(score.value > score.baseline_value for score in scores)),
                str(sum(score.value < score.baseline_value for score in scores)),
            ]
        )
    return lines


_MORE_IS_BETTER = {"of 1"}  # beyond what `verdict` knows


def _numbers(records: Sequence[Record]) -> Lines:
    """A line for each number beside plain SGLang's."""
    records = latest(records)
    hidden = {"suite", "conversations", "turns", "pool"}
    columns = [name for name in dict.fromkeys(n for r in records for n in r.params) if name not in hidden]
    lines = [[*columns, "what", "unit", "value", "plain SGLang", "ratio", ""]]
    for r in records:
        ratio = "" if r.ratio is None else f"{r.ratio:.2f}"
        cells = [*(str(r.params.get(name, "")) for name in columns), r.metric.replace("_", " "), r.unit]
        lines.append([*cells, number(r.value), number(r.baseline_value), ratio, _verdict(r)])
    return lines


def _verdict(record: Record) -> str:
    if record.unit in _MORE_IS_BETTER and record.baseline_value is not None:
        return LOSS if record.value < record.baseline_value else "win" if record.value > record.baseline_value else ""
    return verdict(record)


def _kits(records: Sequence[Record]) -> Lines:
    """A line for each test: whether it passed on both sides, and the first thing that it said where it did not."""
    lines = [["kit", "test", "plain SGLang", "method", "", "says", ""]]
    for r in latest(records, without=["reason"]):
        plain, ours = ("passed" if value else "failed" for value in (r.baseline_value, r.value))
        says = r.params["reason"].replace("|", "\\|")
        lines.append([r.params["kit"], f"`{r.params['test']}`", plain, r.params["method"], ours, says, _verdict(r)])
    return lines
