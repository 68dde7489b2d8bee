"""Predicted and measured steps in one picture: curves are predictions, points are measurements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks.cost_model.cells import STEADY
from benchmarks.cost_model.fit import Sample
from benchmarks.cost_model.results import Measured
from benchmarks.cost_model.step_time import step_seconds
from benchmarks.gpu.decode_cells import DEFAULT

_COLOURS = {"plain": "tab:orange", "freekv": "tab:blue"}
_POINTS_PER_DOUBLING = 8


def draw(run: Measured, path: Path) -> None:
    """By context, for each batch; by everything else; all predictions against their measurements."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_context = [s for s in run.samples if _is_usual(s)]
    batches = sorted({s.cell.batch for s in by_context})
    batches = [b for b in batches if len({s.cell.context for s in by_context if s.cell.batch == b}) > 2]
    figure, axes = plt.subplots(1, len(batches) + 1, figsize=(5 * (len(batches) + 1), 4.5), layout="constrained")
    for batch, axis in zip(batches, axes, strict=False):
        for engine, colour in _COLOURS.items():
            samples = [s for s in by_context if s.cell.batch == batch and s.engine == engine]
            _curve(axis, run, samples, engine, colour)
        axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="decode step, ms", title=f"batch {batch}")
        axis.legend()
    _scatter(axes[-1], run)
    figure.suptitle(f"Decode step, predicted and measured: {run.machine.name}")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _is_usual(sample: Sample) -> bool:
    """Of the curve: the budget and tau that most cells have, everything resident."""
    c = sample.cell
    return c.budget is None or (c.tau == DEFAULT and c.drift == STEADY and not c.windows)


def _curve(axis, run: Measured, samples: list[Sample], engine: str, colour: str) -> None:
    budgets = [s.cell.budget for s in samples]
    samples = sorted((s for s in samples if s.cell.budget == max(set(budgets), key=budgets.count)), key=_context)
    contexts = list(_between(_context(samples[0]), _context(samples[-1])))
    setting = replace(samples[-1].setting, recalled_bytes=0.0)
    predicted = [step_seconds(run.machine, run.model, replace(setting, context=n)) * 1e3 for n in contexts]
    axis.plot(contexts, predicted, color=colour, label=f"{engine}, predicted")
    for calibrates, label in ((False, f"{engine}, measured"), (True, f"{engine}, measured, calibrated by")):
        chosen = [s for s in samples if s.cell.calibrates == calibrates]
        _points(axis, map(_context, chosen), chosen, colour, label)


def _points(axis, x: Iterable[float], samples: list[Sample], colour: str, label: str) -> None:
    """Medians with their 20 to 80 %; those that calibrated are empty."""
    if not samples:
        return
    is_empty = samples[0].cell.calibrates
    medians = [s.seconds * 1e3 for s in samples]
    spread = [[m - s.p20 * 1e3 for m, s in zip(medians, samples, strict=True)]]
    spread.append([s.p80 * 1e3 - m for m, s in zip(medians, samples, strict=True)])
    face = "white" if is_empty else colour
    axis.errorbar(list(x), medians, yerr=spread, fmt="o", color=colour, markerfacecolor=face, label=label)


def _scatter(axis, run: Measured) -> None:
    for engine, colour in _COLOURS.items():
        for calibrates in (False, True):
            chosen = [s for s in run.samples if s.engine == engine and s.cell.calibrates == calibrates]
            predicted = [step_seconds(run.machine, run.model, s.setting) * 1e3 for s in chosen]
            _points(axis, predicted, chosen, colour, f"{engine}{', calibrated by' if calibrates else ''}")
    ends = axis.get_xlim()
    axis.plot(ends, ends, color="grey", linewidth=1, label="equal")
    axis.set(xscale="log", yscale="log", xlabel="predicted, ms", ylabel="measured, ms", title="all steps")
    axis.legend()


def _context(sample: Sample) -> int:
    return sample.cell.context


def _between(first: int, last: int) -> Iterable[int]:
    value = float(first)
    while value < last:
        yield round(value)
        value *= 2 ** (1 / _POINTS_PER_DOUBLING)
    yield last
