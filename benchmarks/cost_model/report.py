"""Tables of the cost model: measurements beside predictions, and plans, which are predictions only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.cost_model import gpu_table
from benchmarks.cost_model.fit import Errors, Sample, errors_of
from benchmarks.cost_model.plans import PLANS, Plan
from benchmarks.cost_model.results import Measured, read_run
from benchmarks.cost_model.step_time import step_seconds
from benchmarks.records import Record
from benchmarks.tables.table import Lines, Table, conditions_of, number

_LEFT_OUT = (
    "The model knows decode steps of equally long requests. It leaves out prefill and what waits for it, the scheduler "
    "and sampling beyond a fixed time, the network, expert models, graphs that are not captured for large batches, "
    "and what a budget loses in accuracy. How many pages change, how many rows are corrected and what is waited for "
    "is put in."
)


def table(records: Sequence[Record], name: str) -> Table:
    """One table, and where its numbers come from.

    Parameters
    ----------
    name : "rates", "steps", "errors", one of `gpu_table` or a plan's
        A plan's may be followed by ":" and a context in tokens, and then has that one only, and its first model.

    Raises
    ------
    ValueError
        If there is no table of this name.
    """
    plan, _, context = name.partition(":")
    if plan in PLANS:
        return plan_table(_part(PLANS[plan], int(context)) if context else PLANS[plan])
    if name in gpu_table.TABLES:
        return gpu_table.TABLES[name]()
    if name not in _MEASURED:
        raise ValueError(f"no table {name!r}; there are {', '.join([*_MEASURED, *PLANS, *gpu_table.TABLES])}")
    run = read_run(records)
    return Table([]) if run is None else Table(_MEASURED[name](run), conditions_of(records))


def _part(plan: Plan, context: int) -> Plan:
    return replace(plan, models=plan.models[:1], contexts=(context,))


def plan_table(plan: Plan) -> Table:
    """The table of a plan, and what it assumes."""
    return Table(plan.lines(), (f"Predictions, nothing is measured. {plan.assumptions} {_LEFT_OUT}",))


def rates(run: Measured) -> Lines:
    """Measured rates, and the prices that the calibrating steps were divided into."""
    m = run.machine
    lines = [["what", "plain SGLang", "FreeKV", "how"]]
    both = [("memory, GB/s", m.memory_gbs), ("recalls, GB/s", m.link_gbs), ("matrix products, GFLOP/s", m.flops / 1e9)]
    lines += [[what, number(rate), number(rate), "measured by itself"] for what, rate in both]
    fitted = {
        "per layer, ms": lambda k: number(k.layer_s * 1e3),
        "per request and layer, ms": lambda k: number(k.request_s * 1e3),
        "KV read, GB/s": lambda k: number(k.attention_gbs),
        "per layer that selects, ms": lambda k: number(k.select_s * 1e3) if k.select_s else "",
        "summaries and codes read, GB/s": lambda k: "" if k.scoring_gbs == float("inf") else number(k.scoring_gbs),
    }
    lines += [[what, show(m.plain), show(m.freekv), "calibrated"] for what, show in fitted.items()]
    return lines


def steps(run: Measured) -> Lines:
    """Every step that was measured, with its prediction; then how far off they are."""
    header = ["engine", "context", "batch", "budget", "tau", "flagged", "recalled KiB/token", "measured ms"]
    lines = [[*header, "20 to 80 %", "predicted ms", "predicted / measured", "used to calibrate"]]
    for sample in sorted(run.samples, key=_order):
        lines.append(_step(run, sample))
    for engine, e in _errors(run).items():
        what = f"{e.count} steps of {engine} that did not calibrate: median error {e.median:.0%}, "
        lines.append([f"{what}largest {e.largest:.0%}", *[""] * (len(lines[0]) - 1)])
    return lines


def errors(run: Measured) -> Lines:
    """How far off the predictions are, of steps that did not calibrate."""
    lines = [["engine", "steps predicted", "median error", "largest error"]]
    found = _errors(run).items()
    return lines + [[engine, str(e.count), f"{e.median:.0%}", f"{e.largest:.0%}"] for engine, e in found]


def _errors(run: Measured) -> dict[str, Errors]:
    held_out = {
        engine: [s for s in run.samples if s.engine == engine and not s.cell.calibrates]
        for engine in ("plain", "freekv")
    }
    return {engine: errors_of(run.machine, run.model, samples) for engine, samples in held_out.items() if samples}


def _order(sample: Sample) -> tuple:
    c = sample.cell
    return sample.engine != "plain", c.context, c.batch, c.budget or 0, c.windows, c.tau


def _step(run: Measured, sample: Sample) -> list[str]:
    c, predicted = sample.cell, step_seconds(run.machine, run.model, sample.setting)
    freekv = ["", "", "", ""]
    if c.budget is not None:
        freekv = [str(c.budget), f"{c.tau:g}", f"{sample.flagged:.2f}", f"{sample.recalled_bytes / 1024:,.0f}"]
    times = [number(seconds * 1e3) for seconds in (sample.seconds, sample.p20, sample.p80, predicted)]
    measured = [times[0], f"{times[1]} to {times[2]}", times[3], f"{predicted / sample.seconds:.2f}"]
    return [sample.engine, str(c.context), str(c.batch), *freekv, *measured, "yes" if c.calibrates else ""]


_MEASURED = {"rates": rates, "steps": steps, "errors": errors}
