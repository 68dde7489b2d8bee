"""Runs phases: starts their servers, sends their workloads, writes the records."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from benchmarks.records import Record, RecordWriter
from benchmarks.server import Server, device_bytes_per_request
from benchmarks.throughput.datasets import Dataset, write_dataset
from benchmarks.throughput.measure import Measurement, device_bytes, equal_outputs, measure
from benchmarks.throughput.setups import PLAIN, Common, Setup
from benchmarks.throughput.workloads import SERIES, Workload

_START_COST = 15.0  # of a server, in the unit of Workload.cost


class Phase(NamedTuple):
    """Workloads that the same servers get. Side by side, they all live and one runs; else one follows the other."""

    name: str
    common: Common
    setups: list[Setup]  # one of them plain SGLang
    workloads: tuple[Workload, ...]
    is_side_by_side: bool

    @property
    def cost(self) -> float:
        rounds = sum(w.rounds * w.cost(s.name == PLAIN) for s in self.setups for w in self.workloads)
        return rounds + _START_COST * len(self.setups)


@dataclass
class Run:
    """One run of the suite.

    Parameters
    ----------
    client_flags : list of str
        Of bench_serving, for all workloads.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    client_flags: list[str]
    writer: RecordWriter
    records: list[Record] = field(default_factory=list)

    def run(self, phases: list[Phase]) -> None:
        """Measure, and write the records of a workload as soon as plain SGLang and another server have done it."""
        self._begin, self._done, self._total = time.monotonic(), 0.0, sum(phase.cost for phase in phases)
        for phase in phases:
            self._measured: dict[tuple[str, Workload], list[Measurement]] = defaultdict(list)
            self._states: dict[str, dict] = {}  # FreeKV's sections of /server_info, by setup
            with contextlib.ExitStack() as stack:
                if phase.is_side_by_side:
                    self._run_side_by_side(phase, stack)
                else:
                    self._run_one_by_one(phase)

    def _run_side_by_side(self, phase: Phase, stack: contextlib.ExitStack) -> None:
        servers = []
        for setup in phase.setups:
            servers.append(stack.enter_context(self._server(phase, setup)))
            servers[-1].freeze()
        for workload in phase.workloads:
            dataset = self._dataset(workload)
            for number in range(workload.rounds):
                for setup, server in zip(phase.setups, servers, strict=True):
                    with server.thawed():
                        self._measure(phase, setup, server, workload, dataset, number)

    def _run_one_by_one(self, phase: Phase) -> None:
        for setup in phase.setups:
            with self._server(phase, setup) as server:
                for workload in phase.workloads:
                    dataset = self._dataset(workload)
                    for number in range(workload.rounds):
                        self._measure(phase, setup, server, workload, dataset, number)

    @contextlib.contextmanager
    def _server(self, phase: Phase, setup: Setup) -> Iterator[Server]:
        self._report(f"{phase.name}: starting {setup.name}")
        flags = list(setup.flags)
        if setup.equal_to is not None:
            tokens = device_bytes(self._states[setup.equal_to]) // phase.common.token_bytes
            flags += ["--max-total-tokens", str(tokens)]
        server = Server(setup.name, flags, self.folder / "logs" / f"{phase.name}-{_file_name(setup.name)}.log")
        try:
            if (state := server.freekv()) is not None:
                self._states[setup.name] = state
            self._done += _START_COST
            yield server
        finally:
            server.stop()

    def _dataset(self, workload: Workload) -> Dataset:
        return write_dataset(workload, self.tokenizer, self.folder / "datasets")

    def _measure(
        self, phase: Phase, setup: Setup, server: Server, workload: Workload, dataset: Dataset, number: int
    ) -> None:
        title = f"{workload.name}, {workload.requests} requests of up to {workload.context} tokens"
        self._report(f"{phase.name}: {title}, {setup.name}" + f", round {number + 1}" * (workload.rounds > 1))
        name = f"{phase.name}-{workload.name}-{workload.context}-{workload.requests}-{_file_name(setup.name)}.jsonl"
        out = self.folder / "client" / name
        measured = self._measured[setup.name, workload]
        measured.append(measure(server, dataset, self.client_flags, out, phase.common.token_bytes))
        self._done += workload.cost(setup.name == PLAIN)
        if len(measured) == workload.rounds:
            others = [s for s in phase.setups if s.name != PLAIN] if setup.name == PLAIN else [setup]
            for other in others:
                if all(len(self._measured[name, workload]) == workload.rounds for name in (PLAIN, other.name)):
                    self._write(phase, other, workload)

    def _write(self, phase: Phase, setup: Setup, workload: Workload) -> None:
        """Medians over the rounds; of ratios, those of the rounds themselves."""
        params = {"phase": phase.name, "workload": workload.name, "setup": setup.name}
        params |= {"requests": workload.requests, "concurrency": workload.at_once}
        params |= {"context": workload.context, "prefix": workload.prefix}
        params |= {"budget": setup.budget, "dtype": phase.common.dtype}
        ours, plain = self._measured[setup.name, workload], self._measured[PLAIN, workload]
        if workload.dataset is not None:
            lengths = [answer.length for answer in ours[0].answers if answer.length is not None]
            params |= {"context": max(lengths, default=0), "dataset": workload.dataset[1].name}
        for metric, number in ours[0].numbers.items():
            values = [m.numbers[metric].value for m in ours if metric in m.numbers]
            others = [m.numbers[metric].value for m in plain if metric in m.numbers]
            pairs = list(zip(values, others, strict=False))
            self._record(metric, median(values), number.unit, params, pairs, median(others) if others else None)
        equal = equal_outputs(ours[0].answers, plain[0].answers, setup.budget)
        if equal is not None:
            self._record("equal_outputs", equal, "ratio", params)
        if phase.name == SERIES and workload.name == "context":
            value, full = device_bytes_per_request(self._states[setup.name], workload.context)
            self._record("device_bytes_per_request", value, "bytes", params, [(value, full)], full)

    def _record(
        self,
        metric: str,
        value: float,
        unit: str,
        params: dict,
        pairs: list[tuple[float, float]] = (),
        plain: float | None = None,
    ) -> None:
        baseline = None if plain is None else PLAIN
        ratio = median(new / old for new, old in pairs) if pairs and all(old for _, old in pairs) else None
        record = self.writer.write(metric, value, unit, params, baseline=baseline, baseline_value=plain, ratio=ratio)
        self.records.append(record)

    def _report(self, text: str) -> None:
        """A line of progress, with the time left as the work done so far suggests."""
        seconds = time.monotonic() - self._begin
        left = f", about {seconds / self._done * (self._total - self._done):.0f} s left" if self._done else ""
        print(f"[{seconds:4.0f} s{left}] {text}", flush=True)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
