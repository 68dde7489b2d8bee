"""What a decode step costs: measured here, predicted, and planned for machines that are not here.

    python -m benchmarks.cost_model                            measure, calibrate, compare
    python -m benchmarks.cost_model --plan --machine rtx4090   plan; nothing is measured
    python -m benchmarks.cost_model --gpu-step --cards H200    steps on cards, kernel by kernel, and goals

The first measures the rates of this machine, and decode steps of plain SGLang and of FreeKV in SGLang's own runner, on
its GPU or, without one, its CPU. It calibrates by a few of the steps, predicts the others, and writes records and a
picture. Traffic (rows corrected, bytes recalled) is counted and handed to the prediction: what a model's queries do is
not predicted. `report` says what else is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cost_model import gpu_table, report
from benchmarks.cost_model.cards import CARDS
from benchmarks.cost_model.machine import MACHINES, Machine
from benchmarks.cost_model.model import Model
from benchmarks.cost_model.picture import draw
from benchmarks.cost_model.plans import Plan
from benchmarks.cost_model.results import NAME, read_run, write_run
from benchmarks.cost_model.traffic import DEFAULT_SOURCE, SOURCES, Traffic, measured_traffic
from benchmarks.records import RESULTS, ROOT, RecordWriter, read_records
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.units import GIB

_SECONDS = 900  # for one engine


def measure(out: Path) -> Path:
    """Measure everything in processes of their own; returns the file of records, which is written when all is done."""
    writer = RecordWriter(NAME, out / f"{NAME}.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for what in ("rates", "plain", "freekv"):
            path = Path(folder) / what
            command = [sys.executable, "-m", "benchmarks.cost_model.measure", what, "--out", str(path)]
            subprocess.run(command, cwd=ROOT, check=True, timeout=_SECONDS)
            found[what] = [json.loads(line) for line in path.read_text().splitlines()]
    writer.path.unlink(missing_ok=True)  # a run replaces the one before: its prices are its own
    (rates,), steps = found["rates"], found["plain"] + found["freekv"]
    if torch.cuda.is_available():
        write_run(writer, rates, steps, "cuda", torch.cuda.get_device_properties(0).total_memory / GIB)
    else:
        write_run(writer, rates, steps, "cpu", writer.environment["ram_gib"])
    return writer.path


def plan(args: argparse.Namespace) -> Plan:
    """What is asked for on the command line."""
    machine = _machine(args)
    models = tuple((Model.load(name, args.weight_bits), (args.tp,)) for name in args.models)
    return Plan(machine, models, tuple(args.contexts), traffic(args))


def traffic(args: argparse.Namespace) -> Traffic:
    """That of the method and the record that are named, where the command line does not say otherwise."""
    wanted = {"turnover": args.turnover, "flagged_share": args.flagged, "exposed_share": args.exposed}
    given = {name: value for name, value in wanted.items() if value is not None}
    return replace(measured_traffic(args.method, args.traffic), **given)


def config(args: argparse.Namespace) -> FreeKVConfig:
    """The settings that `--gpu-step` is about."""
    return replace(gpu_table.CONFIG, candidates=args.candidates)


def _machine(args: argparse.Namespace) -> Machine:
    machine = MACHINES[args.machine] if args.machine in MACHINES else _measured(args.out)
    wanted = {"device_gib": args.device_gib, "host_gib": args.host_gib, "gpus": args.gpus}
    return replace(machine, **{name: value for name, value in wanted.items() if value is not None})


def _measured(folder: Path) -> Machine:
    path = folder / f"{NAME}.jsonl"
    run = read_run(read_records(path)) if path.exists() else None
    if run is None or not run.machine.overlaps:
        found = f"those of {run.machine.name}, which is no GPU" if run else "none"
        raise SystemExit(f"--machine measured needs measurements of a GPU in {path}; there are {found}")
    return run.machine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records and the picture")
    group = parser.add_argument_group("planning")
    group.add_argument("--plan", action="store_true", help="print a table of predictions")
    group.add_argument("--machine", choices=[*MACHINES, "measured"], default="rtx4090")
    group.add_argument("--device-gib", type=float, help="of one GPU, instead of the machine's")
    group.add_argument("--host-gib", type=float, help="of the machine")
    group.add_argument("--gpus", type=int)
    group.add_argument("--tp", type=int, help="GPUs of a replica; by default what is fastest")
    group.add_argument("--models", nargs="+", default=["llama-3.1-8b"], help="names, or paths of a config.json")
    group.add_argument("--weight-bits", type=int, default=16, choices=(4, 8, 16))
    group.add_argument("--contexts", type=int, nargs="+", default=[32768, 131072], help="tokens")
    group.add_argument("--gpu-step", action="store_true", help="print predicted steps on --cards, and the goals")
    group.add_argument("--cards", nargs="+", choices=CARDS, default=["H200", "H100", "A100"])
    group.add_argument("--candidates", type=int, default=0, help="pages scored by codes per selected one; 0: all")
    group.add_argument("--traffic", choices=SOURCES, default=DEFAULT_SOURCE, help="records that traffic is read from")
    group.add_argument("--method", default="freekv", help="whose traffic, by its name there")
    group.add_argument("--turnover", type=float, help="share of pages that a step changes, instead of the recorded one")
    group.add_argument("--flagged", type=float, help="share of rows corrected, likewise")
    group.add_argument("--exposed", type=float, help="share of the recalled bytes that attention waits for, likewise")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.gpu_step:
        print(gpu_table.printed([CARDS[name] for name in args.cards], config(args), traffic(args)))
        return
    if args.plan:
        print(report.plan_table(plan(args)))
        return
    records = read_records(measure(args.out))
    draw(read_run(records), args.out / f"{NAME}.png")
    for name in ("rates", "steps", *gpu_table.TABLES):
        print(report.table(records, name))


if __name__ == "__main__":
    main()
