"""Numbers of a comparison with their intervals, as records, and the tables made from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.accuracy.intervals import Interval, bootstrap
from benchmarks.footprint import FULL_ATTENTION, TITLE, Footprint, cell
from benchmarks.real_model.compare import Comparison
from benchmarks.records import Record, RecordWriter
from benchmarks.tables.table import Row, Table, conditions_of, number, rows_of

FULL = "full attention"
ALL = "all"  # kinds of texts
WHOLE = "whole"  # the method that attends to everything: what is left is rounding, and the order of sums
# Metric -> unit, of those that are means over steps and texts.
_MEANS = {
    "kl": "nats",
    "agrees": "share",
    "kept": "share",
    "best": "share",
    "flagged": "share",
    "turnover": "share",
    "similarity": "cosine",
}
_OF_TOKENS = "of the text's tokens"


def write_records(comparison: Comparison, kinds: Sequence[str], writer: RecordWriter, shared: dict) -> list[Record]:
    """One record per number; an interval is a record of its upper end, compared with its lower end.

    Parameters
    ----------
    kinds : sequence of str, ``[num_texts]``
        Of the texts.
    shared : dict
        Parameters of all cells of the run.
    """
    c, records = comparison, []
    params = {"method": c.method, "context": c.context, "budget": c.budget, **shared}
    for kind in (ALL, *dict.fromkeys(kinds)):
        is_of = np.array([kind in (ALL, of_text) for of_text in kinds])
        for name, interval, unit in _intervals(c, is_of, kind == ALL):
            of_kind = {**params, "kind": kind}
            is_ratio = name == "perplexity"
            full = float(np.exp(c.of_texts("nll_full")[is_of].mean()))
            compared = {"baseline": FULL, "baseline_value": full} if is_ratio else {}
            records.append(writer.write(name, interval.value * (full if is_ratio else 1), unit, of_kind, **compared))
            ends = {"baseline": "low", "baseline_value": interval.low}
            records.append(writer.write(f"{name}_high", interval.high, "ratio" if is_ratio else unit, of_kind, **ends))
    for name in ("exposed_bytes", "hidden_bytes"):
        records.append(writer.write(name, getattr(c, name), "bytes per token", {**params, "kind": ALL}))
    if c.pages:
        records.append(writer.write("pages", c.pages, "pages per row", {**params, "kind": ALL}))
        records.append(writer.write("scored", c.scored, "share", {**params, "kind": ALL}))
    for name, value in c.footprint.records().items():
        records.append(writer.write(name, value, "ratio", {**params, "kind": ALL}))
    return records


def write_full(comparison: Comparison, kinds: Sequence[str], writer: RecordWriter, shared: dict) -> list[Record]:
    """What full attention predicts, and holds: what the others are compared with."""
    params = {"method": "full", "context": comparison.context, **shared}
    held = FULL_ATTENTION.records().items()
    records = [writer.write(name, value, "ratio", {**params, "kind": ALL}) for name, value in held]
    for kind in (ALL, *dict.fromkeys(kinds)):
        is_of = np.array([kind in (ALL, of_text) for of_text in kinds])
        value = float(np.exp(comparison.of_texts("nll_full")[is_of].mean()))
        records.append(writer.write("perplexity", value, _OF_TOKENS, {**params, "kind": kind}))
    return records


def write_drift(comparison: Comparison, kinds: Sequence[str], writer: RecordWriter, shared: dict) -> list[Record]:
    """How far queries and windows move from step to step, by layer and kind of text."""
    c, records = comparison, []
    for kind in dict.fromkeys(kinds):
        is_of = np.array([kind == of_text for of_text in kinds])
        for name in ("similarity", "flagged", "turnover", "kept"):
            by_layer = getattr(c, name)[:, is_of].mean((0, 1))
            params = {"method": c.method, "context": c.context, "budget": c.budget, **shared, "kind": kind}
            for layer, value in enumerate(by_layer):
                records.append(writer.write(f"layer_{name}", float(value), _MEANS[name], {**params, "layer": layer}))
    return records


def _intervals(c: Comparison, is_of: np.ndarray, is_whole: bool) -> Iterator[tuple[str, Interval, str]]:
    """Name, interval and unit of what is shown of some texts."""
    for name in _MEANS if is_whole else ("kl", "agrees"):
        yield name, bootstrap(c.of_texts(name)[is_of]), _MEANS[name]
    lost = bootstrap((c.of_texts("nll") - c.of_texts("nll_full"))[is_of])
    yield "perplexity", Interval(*np.exp(lost).tolist()), _OF_TOKENS


def table(records: Sequence[Record], name: str) -> Table:
    """The kind of tables "real_model": a line for each method, the best first.

    Parameters
    ----------
    name : CONTEXT:BUDGET, or CONTEXT:BUDGET:KIND
    """
    context, budget, kind = [*name.split(":"), ALL][:3]
    rows = [
        row
        for row in rows_of(record for record in records if "layer" not in record.params)
        if row.params["kind"] == kind
        and row.params["context"] == int(context)
        and (row.params.get("budget") == int(budget) or row.params["method"] in ("full", WHOLE))
    ]
    rows.sort(key=lambda row: row.numbers["kl"].value if "kl" in row.numbers else 0)
    lines = [list(_COLUMNS), *([shown(row) for shown in _COLUMNS.values()] for row in rows)]
    keep = [i for i in range(len(_COLUMNS)) if any(line[i] for line in lines[1:])]
    return Table([[line[i] for i in keep] for line in lines], conditions_of(r for row in rows for r in row.records))


def _with_interval(metric: str, digits: int = 3):
    def shown(row: Row) -> str:
        if f"{metric}_high" not in row.numbers:
            return ""
        value, high = row.numbers[metric], row.numbers[f"{metric}_high"]
        share = value.value if value.ratio is None else value.ratio
        return f"{number(share, digits)} [{number(high.baseline_value, digits)}, {number(high.value, digits)}]"

    return shown


def _plain(metric: str, scale: float = 1):
    def shown(row: Row) -> str:
        return number(row.numbers[metric].value * scale) if metric in row.numbers else ""

    return shown


def _held(row: Row) -> str:
    held = [row.numbers[name].value for name in FULL_ATTENTION.records() if name in row.numbers]
    return cell([Footprint(*held)]) if held else ""


_COLUMNS = {
    "method": lambda row: row.params["method"],
    "budget": lambda row: f"{row.params['budget']:,}" if "budget" in row.params else "",
    "perplexity": _plain("perplexity"),
    "KL, nats": _with_interval("kl"),
    "times full": _with_interval("perplexity", 4),
    "same top token": _with_interval("agrees"),
    "mass kept": _plain("kept"),
    "most possible": _plain("best"),
    "rows flagged": _plain("flagged"),
    "pages that change": _plain("turnover"),
    "pages read": _plain("pages"),
    "rows scored": _plain("scored"),
    "KiB/token, waited for": _plain("exposed_bytes", 1 / 1024),
    "KiB/token, hidden": _plain("hidden_bytes", 1 / 1024),
    TITLE: _held,
}
