"""Tables of the cost model, in markdown.

    python -m benchmarks.cost_model.report benchmarks/README.md

fills `<!-- cost_model cost_model TABLE -->` ... `<!-- end -->`. TABLE is `rates` or `steps`, from the measurements of
benchmarks/results/cost_model.jsonl, or a plan of `plans`, which is prediction from published figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cost_model.fit import Sample, errors_of
from benchmarks.cost_model.plans import PLANS, Plan
from benchmarks.cost_model.results import Measured, read_run
from benchmarks.cost_model.step_time import step_seconds
from benchmarks.records import Record, fill_marked, render_lines, sources

_LEFT_OUT = (
    "The model knows decode steps of equally long requests. It leaves out prefill and what waits for it, the scheduler "
    "and sampling beyond a fixed time, the network, expert models, graphs that are not captured for large batches, "
    "FlashInfer's workspaces, and what a budget loses in accuracy. How many pages change and how many rows are "
    "corrected is put in."
)
Lines = list[list[str]]


def table(records: Sequence[Record], name: str) -> str:
    """One table, and below it where its numbers come from.

    Raises
    ------
    ValueError
        If there is no table of this name.
    """
    if name in PLANS:
        return render_plan(PLANS[name])
    if name not in _MEASURED:
        raise ValueError(f"no table {name!r}; there are {', '.join([*_MEASURED, *PLANS])}")
    run = read_run(records)
    return "No records yet.\n" if run is None else f"{_render(_MEASURED[name](run))}\n{sources(records)}"


def render_plan(plan: Plan) -> str:
    """The table of a plan, and what it assumes."""
    return f"{_render(plan.lines())}\nPredictions, nothing is measured. {plan.assumptions} {_LEFT_OUT}\n"


def _render(lines: Lines) -> str:
    header, *body = lines
    return render_lines([header, ["---"] * len(header), *body])


def rates(run: Measured) -> Lines:
    """Measured rates, and the prices that the calibrating steps were divided into."""
    m = run.machine
    lines = [["what", "plain SGLang", "FreeKV", "how"]]
    both = [("memory, GB/s", m.memory_gbs), ("recalls, GB/s", m.link_gbs), ("matrix products, GFLOP/s", m.flops / 1e9)]
    lines += [[what, f"{rate:.3g}", f"{rate:.3g}", "measured by itself"] for what, rate in both]
    fitted = {
        "per layer, ms": lambda k: f"{k.layer_s * 1e3:.3g}",
        "per request and layer, ms": lambda k: f"{k.request_s * 1e3:.3g}",
        "KV read, GB/s": lambda k: f"{k.attention_gbs:.3g}",
        "per layer that selects, ms": lambda k: f"{k.select_s * 1e3:.3g}" if k.select_s else "",
        "summaries and codes read, GB/s": lambda k: "" if k.scoring_gbs == float("inf") else f"{k.scoring_gbs:.3g}",
    }
    lines += [[what, show(m.plain), show(m.freekv), "calibrated"] for what, show in fitted.items()]
    return lines


def steps(run: Measured) -> Lines:
    """Every step that was measured, with its prediction; then how far off they are."""
    header = ["engine", "context", "batch", "budget", "tau", "flagged", "recalled KiB/token", "measured ms"]
    lines = [[*header, "20 to 80 %", "predicted ms", "predicted / measured", "used to calibrate"]]
    for sample in sorted(run.samples, key=_order):
        lines.append(_step(run, sample))
    for engine in ("plain", "freekv"):
        held_out = [s for s in run.samples if s.engine == engine and not s.cell.calibrates]
        if held_out:
            errors = errors_of(run.machine, run.model, held_out)
            what = f"{errors.count} steps of {engine} that did not calibrate: median error {errors.median:.0%}, "
            lines.append([f"{what}largest {errors.largest:.0%}", *[""] * (len(lines[0]) - 1)])
    return lines


def _order(sample: Sample) -> tuple:
    c = sample.cell
    return sample.engine != "plain", c.context, c.batch, c.budget or 0, c.windows, c.tau


def _step(run: Measured, sample: Sample) -> list[str]:
    c, predicted = sample.cell, step_seconds(run.machine, run.model, sample.setting)
    freekv = ["", "", "", ""]
    if c.budget is not None:
        freekv = [str(c.budget), f"{c.tau:g}", f"{sample.flagged:.2f}", f"{sample.recalled_bytes / 1024:,.0f}"]
    times = [f"{seconds * 1e3:.3g}" for seconds in (sample.seconds, sample.p20, sample.p80, predicted)]
    measured = [times[0], f"{times[1]} to {times[2]}", times[3], f"{predicted / sample.seconds:.2f}"]
    return [sample.engine, str(c.context), str(c.batch), *freekv, *measured, "yes" if c.calibrates else ""]


_MEASURED = {"rates": rates, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args().files:
        path.write_text(fill_marked(path.read_text(), "cost_model", table))


if __name__ == "__main__":
    main()
