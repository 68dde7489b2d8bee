"""Tables of any records: one metric with its baseline, all metrics below each other, or several side by side."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.records import Record, verdict
from benchmarks.tables.table import Table, conditions_of, latest, number


def one_metric(records: Sequence[Record], name: str) -> Table:
    """A line for each combination of parameters; where there is a baseline, the ratio, and whether it is a loss.

    Parameters
    ----------
    name : METRIC, or METRIC:PARAMS joined by "," that are shown, instead of all
    """
    metric, _, shown = name.partition(":")
    records = latest(record for record in records if record.metric == metric)
    if not records:
        return Table([])
    columns = shown.split(",") if shown else list(dict.fromkeys(param for record in records for param in record.params))
    baseline = next((record.baseline for record in records if record.baseline), None)
    header = [*columns, f"{metric.replace('_', ' ')} ({records[0].unit})"]
    lines = [header + ([baseline, "ratio", ""] if baseline else [])]
    for record in records:
        cells = [*(str(record.params.get(param, "")) for param in columns), number(record.value)]
        if baseline:
            ratio = f"{record.ratio:.2f}" if record.ratio else ""
            cells += [number(record.baseline_value), ratio, verdict(record)]
        lines.append(cells)
    return Table(lines, conditions_of(records))


def every_metric(records: Sequence[Record], _: str) -> Table:
    """A line for each record, whatever it measured."""
    records = latest(records)
    columns = list(dict.fromkeys(name for record in records for name in record.params))
    lines = [[*columns, "what", "value", "unit"]]
    for r in records:
        cells = [str(r.params.get(name, "")) for name in columns]
        lines.append([*cells, r.metric.replace("_", " "), number(r.value), r.unit])
    return Table(lines, conditions_of(records))


def pivot(records: Sequence[Record], layout: str) -> Table:
    """A line for each combination of the named parameters, a column for each metric and each value of the others.

    With ``flagged_share+cosine:family,layer`` a line is a layer of a family; columns are the share for each tau, and
    the cosine.

    Parameters
    ----------
    layout : METRICS joined by "+", ":", PARAMS joined by ","
    """
    metrics, _, params = layout.partition(":")
    wanted, names = metrics.split("+"), params.split(",")
    records = [record for record in latest(records) if record.metric in wanted]
    records.sort(key=lambda record: wanted.index(record.metric))
    others = [name for name in dict.fromkeys(n for r in records for n in r.params) if _varies(records, name)]
    others = [name for name in others if name not in names]
    lines: dict[tuple, dict[str, str]] = {}
    for r in records:
        column = " ".join([r.metric.replace("_", " "), *(str(r.params[name]) for name in others if name in r.params)])
        lines.setdefault(tuple(str(r.params.get(name, "")) for name in names), {})[column] = f"{r.value:.3f}"
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    body = [[*key, *(line.get(column, "") for column in columns)] for key, line in lines.items()]
    return Table([[*names, *columns], *body], conditions_of(records))


def _varies(records: Sequence[Record], name: str) -> bool:
    return len({r.params[name] for r in records if name in r.params}) > 1
