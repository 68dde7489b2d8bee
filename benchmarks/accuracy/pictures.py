"""Pictures of a matrix: accuracy against budget, recalled bytes or flagged share, in a panel for each task group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, PercentFormatter, ScalarFormatter

from benchmarks.accuracy.report import group_rows, rows_of, varying
from benchmarks.accuracy.results import FULL
from benchmarks.records import Record
from benchmarks.tables.table import Row

# Okabe and Ito's palette, which the colour-blind tell apart; black is full attention.
_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
_MARKERS = "osD^vPX"
_STYLE = {
    "svg.hashsalt": "accuracy",  # the same picture gives the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}


class Point(NamedTuple):
    x: float
    score: float
    low: float  # of the score's 95 % interval
    high: float


class Axis(NamedTuple):
    """What a picture shows accuracy against."""

    x_of: Callable[[Sequence[Row]], float | None]  # rows of a task group with one setting -> x
    label: str
    scale: str = "linear"
    line_of: Callable[[Row, Sequence[str]], str] | None = None  # row, fields that vary -> name of its line
    has_intervals: bool = False


def draw(records: Sequence[Record], folder: Path, context: int | None = None, stem: str = "") -> list[Path]:
    """Write budget.svg and recalled.svg: means over a task group, at one context, by default the longest."""
    rows = rows_of(records)
    context = context or max(row.params["context"] for row in rows)
    rows = [row for row in rows if row.params["context"] == context]
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "budget.svg": Axis(_budget, "budget (tokens)", "log"),
        "recalled.svg": Axis(_recalled, "recalled per token (KiB)"),
    }
    return [_draw(rows, context, folder / f"{stem}{name}", axis) for name, axis in pictures.items()]


def draw_flagged(records: Sequence[Record], path: Path) -> Path:
    """Draw scores against the share of rows that were corrected; methods are named "SELECTOR, tau T", a line for each
    selector."""
    rows = sorted(rows_of(records), key=lambda row: _flagged([row]) or 0.0)
    axis = Axis(_flagged, "flagged share of rows", line_of=_selector, has_intervals=True)
    return _draw(rows, max(row.params["context"] for row in rows), path, axis)


def _budget(rows: Sequence[Row]) -> float | None:
    return rows[0].params.get("budget")


def _recalled(rows: Sequence[Row]) -> float | None:
    values = [row.numbers["recalled_per_token"].value for row in rows if "recalled_per_token" in row.numbers]
    return mean(values) / 1024 if values else None


def _flagged(rows: Sequence[Row]) -> float | None:
    shares = [row.numbers["flagged_share"].value for row in rows if "flagged_share" in row.numbers]
    return mean(shares) if shares else None


def _selector(row: Row, _: Sequence[str]) -> str:
    return row.params["method"].partition(", tau")[0]


def _draw(rows: Sequence[Row], context: int, path: Path, axis: Axis) -> Path:
    fields, line_of = varying(rows), axis.line_of or _name
    names = list(dict.fromkeys(line_of(row, fields) for row in rows if row.params["method"] != FULL))
    groups = list(dict.fromkeys(row.params["group"] for row in rows))
    with plt.rc_context(_STYLE):
        width = math.ceil(math.sqrt(len(groups)))
        height = math.ceil(len(groups) / width)
        size = (3.2 * width, 2.6 * height + 0.6)
        figure, axes = plt.subplots(height, width, figsize=size, sharey=True, squeeze=False, layout="constrained")
        for panel in axes.flat[len(groups) :]:
            panel.axis("off")
        for group, panel in zip(groups, axes.flat, strict=False):
            members = [row for row in rows if row.params["group"] == group]
            _panel(panel, members, names, fields, axis)
            panel.set(title=group, xlabel=axis.label, xscale=axis.scale, ylim=(-0.03, 1.03))
            panel.yaxis.set_major_formatter(PercentFormatter(1))
            if axis.scale == "log":  # budgets themselves, not powers of ten
                budgets = sorted({row.params["budget"] for row in members if "budget" in row.params})
                panel.set_xticks(budgets)
                panel.xaxis.set_major_formatter(ScalarFormatter())
                panel.xaxis.set_minor_locator(NullLocator())
        for panel in axes[:, 0]:
            panel.set_ylabel("accuracy")
        handles = {
            text: line for panel in axes.flat for line, text in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 4))
        figure.suptitle(f"{context:,} tokens")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return path


def _panel(panel: Axes, rows: Sequence[Row], names: Sequence[str], fields: Sequence[str], axis: Axis) -> None:
    lines: dict[str, list[Point]] = {name: [] for name in names}
    for members in group_rows(rows, fields).values():
        score, x = mean(row.numbers["score"].value for row in members), axis.x_of(members)
        if members[0].params["method"] == FULL:
            panel.axhline(score, color="black", linestyle="--", linewidth=1, label="full attention")
        elif x is not None:
            highs = [row.numbers["score_high"] for row in members]
            ends = mean(high.baseline_value for high in highs), mean(high.value for high in highs)
            lines[(axis.line_of or _name)(members[0], fields)].append(Point(x, score, *ends))
    for number, (name, points) in enumerate(lines.items()):
        if points:
            color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
            x, score, low, high = zip(*points, strict=True)
            panel.plot(x, score, color=color, marker=marker, markersize=4, linewidth=1.3, label=name)
            if axis.has_intervals:
                panel.vlines(x, low, high, color=color, linewidth=0.8, alpha=0.6)


def _name(row: Row, fields: Sequence[str]) -> str:
    """A line of a picture: the method, and what of its layout differs between rows."""
    layout = [f"{field.replace('_', ' ')} {row.params[field]}" for field in fields if field in row.params]
    return ", ".join([row.params["method"], *layout])
