"""Calibrate the model of the machine at hand: rates measured by themselves, the rest by a few measured steps.

Weights and recalls are priced by the rates of memory, matrix products and link. What is left of the calibrating steps
is divided, by least squares of relative errors, among prices per layer, per request and layer, and per byte of KV, and
for FreeKV per selection of a layer and per byte of summaries and codes. No price is negative, and no byte is cheaper
than memory's rate. The other steps are then predicted; nothing was fitted to them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from benchmarks.cost_model.cells import Cell
from benchmarks.cost_model.machine import Kernels, Machine
from benchmarks.cost_model.model import Model
from benchmarks.cost_model.step_time import Setting, Work, step_seconds, weights_seconds, work_of

_PRICED = {
    "plain": ("layers", "layer_requests", "attention_bytes"),
    "freekv": ("layers", "layer_requests", "attention_bytes", "selections", "scoring_bytes"),
}


@dataclass(frozen=True)
class Sample:
    """One measured step, with the traffic that was counted in it."""

    cell: Cell
    seconds: float  # median
    p20: float
    p80: float
    flagged: float = 0.0  # share of the rows over their budget
    recalled_bytes: float = 0.0  # per request and step

    @property
    def engine(self) -> str:
        return "plain" if self.cell.budget is None else "freekv"

    @property
    def setting(self) -> Setting:
        c = self.cell
        if c.budget is None:
            return Setting(c.context, c.batch)
        # Recalls are not counted by who waits for them; a CPU waits for all.
        exposed = self.flagged
        return Setting(c.context, c.batch, c.config, self.flagged, self.recalled_bytes, exposed)


def describe_machine(
    name: str, sizes: dict[str, float], rates: dict[str, float], samples: Sequence[Sample], model: Model, is_gpu: bool
) -> Machine:
    """The machine that the samples were measured on.

    Parameters
    ----------
    sizes : device_gib, host_gib
    rates : memory_gbs, link_gbs, flops
    samples : of both engines; those whose cell calibrates are used

    Raises
    ------
    ValueError
        If there are fewer of an engine than prices.
    """
    nothing = Kernels(0, 0, 0, rates["memory_gbs"])
    machine = Machine(
        name=name,
        host_gbs=float("inf"),  # one GPU's link was measured, as far as the host feeds it
        plain=nothing,
        freekv=nothing,
        source="Rates and fixed times are measured.",
        overlaps=is_gpu,
        **sizes,
        **rates,
    )
    kernels = {engine: _fit(machine, model, samples, engine) for engine in _PRICED}
    return Machine(**(vars(machine) | kernels))


def _fit(machine: Machine, model: Model, samples: Sequence[Sample], engine: str) -> Kernels:
    used = [sample for sample in samples if sample.engine == engine and sample.cell.calibrates]
    names = _PRICED[engine]
    if len(used) < len(names):
        raise ValueError(f"{len(used)} calibrating steps of {engine} for {len(names)} prices; measure all of `cells`")
    works = [work_of(model, sample.setting, machine.device) for sample in used]
    left = [sample.seconds - _known(machine, work) for sample, work in zip(used, works, strict=True)]
    measured = np.array([sample.seconds for sample in used])
    amounts = np.array([[float(getattr(work, name)) for name in names] for work in works])
    scale = amounts.max(0)
    least = np.array([1 / (machine.memory_gbs * 1e9) if name.endswith("_bytes") else 0.0 for name in names])
    bounds = least * scale, np.full(len(names), np.inf)
    found = lsq_linear(amounts / scale / measured[:, None], np.array(left) / measured, bounds)
    price = dict(zip(names, found.x / scale, strict=True))
    return Kernels(
        step_s=0.0,  # one model was measured: what a step costs once is in the price of its layers
        layer_s=price["layers"],
        request_s=price["layer_requests"],
        attention_gbs=1e-9 / price["attention_bytes"],
        select_s=price.get("selections", 0.0),
        scoring_gbs=1e-9 / price["scoring_bytes"] if "scoring_bytes" in price else float("inf"),
    )


def _known(machine: Machine, work: Work) -> float:
    """What measured rates say of a step; on a GPU recalls hide, so only a CPU's count."""
    recalls = 0.0 if machine.overlaps else (work.hidden_bytes + work.exposed_bytes) / (machine.link_gbs * 1e9)
    return weights_seconds(machine, work) + recalls


@dataclass(frozen=True)
class Errors:
    """How far predictions are off: |predicted / measured - 1|."""

    count: int
    median: float
    largest: float


def errors_of(machine: Machine, model: Model, samples: Sequence[Sample]) -> Errors:
    """Of some samples, at least one."""
    found = [abs(step_seconds(machine, model, s.setting) / s.seconds - 1) for s in samples]
    return Errors(len(found), statistics.median(found), max(found))
