"""Measured samples as records, and back: the file holds measurements only, predictions are made when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.cost_model.cells import Cell, shape_for
from benchmarks.cost_model.fit import Sample, describe_machine
from benchmarks.cost_model.machine import Machine
from benchmarks.cost_model.model import Model
from benchmarks.gpu.shapes import ModelShape
from benchmarks.records import Record, RecordWriter

NAME = "cost_model"
_RATES = {"memory_gbs": ("memory_rate", "GB/s"), "flops": ("matmul_rate", "op/s"), "link_gbs": ("recall_rate", "GB/s")}


@dataclass(frozen=True)
class Measured:
    """One run: the machine that its rates and calibrating steps describe, the model, and all steps."""

    machine: Machine
    model: Model
    samples: list[Sample]


def write_run(
    writer: RecordWriter, rates: dict[str, float], samples: Sequence[dict], device: str, device_gib: float
) -> None:
    """Append what was measured, as `measure` wrote it."""
    shape = asdict(shape_for(device))
    for key, (metric, unit) in _RATES.items():
        writer.write(metric, rates[key], unit, {"device": device})
    writer.write("device_memory", device_gib, "GiB", {"device": device})
    for sample in samples:
        values = dict(sample)
        cell, seconds = values.pop("cell"), values.pop("seconds")
        params = {"device": device, **shape, **{k: v for k, v in cell.items() if v is not None}, **values}
        writer.write("decode_step", seconds * 1e3, "ms", params)


def read_run(records: Sequence[Record]) -> Measured | None:
    """The run of these records, calibrated; None where there are none."""
    if not records:
        return None
    steps = [r for r in records if r.metric == "decode_step"]
    values = {r.metric: r.value for r in records}
    rates = {key: values[metric] for key, (metric, _) in _RATES.items()}
    samples = [_sample(r) for r in steps]
    shape = ModelShape(**{name: steps[0].params[name] for name in ModelShape.__dataclass_fields__})
    model, environment = Model.of_shape(shape), records[-1].environment
    name = environment["gpu"] or environment["cpu"]
    sizes = {"device_gib": values["device_memory"], "host_gib": environment["ram_gib"]}
    machine = describe_machine(name, sizes, rates, samples, model, is_gpu=steps[0].params["device"] == "cuda")
    return Measured(machine, model, samples)


def _sample(record: Record) -> Sample:
    p = record.params
    values = {name: p[name] for name in Cell.__dataclass_fields__ if name in p}
    counted = {name: p[name] for name in ("p20", "p80", "flagged", "recalled_bytes") if name in p}
    # Records that do not name their selector are older than the one that is the default now.
    return Sample(Cell(**({"budget": None, "selector": "codes"} | values)), record.value / 1e3, **counted)
