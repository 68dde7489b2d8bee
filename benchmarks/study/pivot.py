"""Tables that show several metrics of a file of records side by side.

`<!-- pivot FILE METRICS:PARAMS -->` ... `<!-- end -->` in a markdown text becomes a table with a line for each
combination of the named parameters, and a column for each metric and each value of the parameters that are left: with
``flagged_share+cosine:family,layer`` a line is a layer of a family; columns are the share for each tau, and the cosine.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.records import Record, render_lines, sources


def pivot(records: Sequence[Record], table: str) -> str:
    """The table, and below it what its records were measured on; of equal records the latest counts.

    Parameters
    ----------
    table : METRICS joined by "+", ":", PARAMS joined by ","
    """
    metrics, _, params = table.partition(":")
    wanted, names = metrics.split("+"), params.split(",")
    records = [record for record in records if record.metric in wanted]
    if not records:
        return "No records yet.\n"
    records.sort(key=lambda record: wanted.index(record.metric))
    others = [name for name in dict.fromkeys(n for r in records for n in r.params) if _varies(records, name)]
    others = [name for name in others if name not in names]
    lines: dict[tuple, dict[str, str]] = {}
    for r in records:
        column = " ".join([r.metric.replace("_", " "), *(str(r.params[name]) for name in others if name in r.params)])
        lines.setdefault(tuple(str(r.params.get(name, "")) for name in names), {})[column] = f"{r.value:.3f}"
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    body = [[*key, *(line.get(column, "") for column in columns)] for key, line in lines.items()]
    header = [*names, *columns]
    return f"{render_lines([header, ['---'] * len(header), *body])}\n{sources(records)}"


def _varies(records: Sequence[Record], name: str) -> bool:
    return len({r.params[name] for r in records if name in r.params}) > 1
