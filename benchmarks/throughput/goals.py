"""The goals, as data, and what a run says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.records import Record
from benchmarks.throughput.setups import FREEKV
from benchmarks.throughput.workloads import MEMORY, SERIES, TRAFFIC


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio to plain SGLang, or on a value where `is_value`."""

    text: str
    where: dict[str, int | str]  # parameters of the record
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    is_value: bool = False

    def verdict(self, records: Sequence[Record]) -> str:
        found = [r for r in records if r.metric == self.metric and self._is_about(r)]
        bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        value = (found[-1].value if self.is_value else found[-1].ratio) if found else None
        if value is None:
            return f"{self.text}: {bound}; not measured in this run"
        is_low = self.at_least is not None and value < self.at_least
        is_high = self.at_most is not None and value > self.at_most
        return f"{self.text}: {bound}, got {value:.2f}: {'MISSED' if is_low or is_high else 'reached'}"

    def _is_about(self, record: Record) -> bool:
        return record.params["setup"] == FREEKV and all(record.params[k] == v for k, v in self.where.items())


_16K = {"phase": MEMORY, "workload": "memory", "context": 16384}
GOALS = (
    Goal(
        "decode throughput at 32K, batch 8, times plain SGLang's",
        {"phase": SERIES, "workload": "context", "context": 32768, "requests": 8},
        "decode_throughput",
        at_least=4,
    ),
    Goal(
        "output throughput of short requests, times plain SGLang's",
        {"phase": TRAFFIC, "workload": "short"},
        "output_throughput",
        at_least=0.9,
    ),
    Goal(
        "time to first token with a shared prefix of 16K (p50), times plain SGLang's",
        {"phase": TRAFFIC, "workload": "prefix", "prefix": 16384},
        "ttft_p50",
        at_most=1.2,
    ),
    Goal("requests at once in equal device bytes at 16K, times plain SGLang's", _16K, "peak_concurrency", at_least=4),
    Goal("share of those requests that finished", _16K, "finished", at_least=1, is_value=True),
)


def report_goals(records: Sequence[Record]) -> str:
    return "\n".join(goal.verdict(records) for goal in GOALS)
