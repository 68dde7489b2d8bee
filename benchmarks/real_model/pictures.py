"""Pictures: KL against budget, KL against recalled bytes, and drift by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.real_model.summary import ALL, WHOLE
from benchmarks.records import Record
from benchmarks.tables.table import Row, rows_of

_STYLE = {"svg.hashsalt": "real_model", "font.size": 9, "axes.grid": True, "grid.color": "#dddddd"}
_MARKERS = "osD^vPX<>h*p"


def draw(records: Sequence[Record], folder: Path, stem: str = "real_model") -> list[Path]:
    """Write STEM_recalled.svg, STEM_budget.svg where there are several, and STEM_drift.svg where there are layers."""
    of_methods = (r for r in records if r.params["kind"] == ALL and "layer" not in r.params and "budget" in r.params)
    rows = rows_of(of_methods)
    pictures = {
        "budget": ("budget (tokens)", lambda row: row.params["budget"]),
        "recalled": ("recalled per token (KiB)", _recalled),
    }
    paths = []
    if len({row.params["budget"] for row in rows if row.params["method"] != WHOLE}) == 1:
        del pictures["budget"]
    for name, (label, x_of) in pictures.items():
        paths.append(folder / f"{stem}_{name}.svg")
        _draw_kl(rows, label, x_of, paths[-1])
    by_layer = rows_of(record for record in records if "layer" in record.params)
    if by_layer:
        paths.append(folder / f"{stem}_drift.svg")
        _draw_drift(by_layer, paths[-1])
    return paths


def _recalled(row: Row) -> float:
    return sum(row.numbers[f"{part}_bytes"].value for part in ("exposed", "hidden")) / 1024


def _draw_kl(rows: Sequence[Row], label: str, x_of: Callable[[Row], float], path: Path) -> None:
    """A panel for each context, a line for each method."""
    contexts = sorted({row.params["context"] for row in rows})
    methods = list(dict.fromkeys(row.params["method"] for row in rows))
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1, len(contexts), figsize=(4.2 * len(contexts), 4.2), sharey=True, squeeze=False, layout="constrained"
        )
        for context, panel in zip(contexts, axes[0], strict=True):
            of_context = [row for row in rows if row.params["context"] == context]
            _lines(panel, of_context, methods, x_of)
            panel.set(title=f"{context:,} tokens", xlabel=label, yscale="log")
        axes[0, 0].set_ylabel("KL(full || method), nats")
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
        _save(figure, path)


def _lines(panel: Axes, rows: Sequence[Row], methods: Sequence[str], x_of: Callable[[Row], float]) -> None:
    for number, method in enumerate(methods):
        points = sorted((x_of(row), row.numbers["kl"].value) for row in rows if row.params["method"] == method)
        if method == WHOLE and points:  # what rounding alone does
            panel.axhline(points[0][1], color="black", linestyle="--", linewidth=1, label=method)
        elif points:
            marker = _MARKERS[number % len(_MARKERS)]
            panel.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.2, label=method)


def _draw_drift(rows: Sequence[Row], path: Path) -> None:
    """By layer, a line for each kind of text, at the longest context and its smallest budget."""
    context = max(row.params["context"] for row in rows)
    budget = min(row.params["budget"] for row in rows if row.params["context"] == context)
    rows = [row for row in rows if (row.params["context"], row.params["budget"]) == (context, budget)]
    labels = {
        "layer_similarity": "cosine with the step before",
        "layer_turnover": "share of selected pages that change",
        "layer_kept": "attention mass of the window",
    }
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, len(labels), figsize=(12, 3.6), layout="constrained")
        for (metric, label), panel in zip(labels.items(), axes, strict=True):
            for kind in dict.fromkeys(row.params["kind"] for row in rows):
                points = [(r.params["layer"], r.numbers[metric].value) for r in rows if r.params["kind"] == kind]
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=kind)
            panel.set(xlabel="layer", ylabel=label, ylim=(0, 1.02))
        axes[0].legend(frameon=False)
        figure.suptitle(f"{context:,} tokens, budget {budget:,}, selected exactly in every step")
        _save(figure, path)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
