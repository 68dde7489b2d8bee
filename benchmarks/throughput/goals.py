"""The goals under load, as data, and what records say about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.goals import Goal
from benchmarks.records import Record
from benchmarks.throughput.setups import FREEKV
from benchmarks.throughput.workloads import MEMORY, SERIES, TRAFFIC


@dataclass(frozen=True)
class _Wanted:
    """A bound on a ratio to plain SGLang, or on a value where `is_value`."""

    text: str
    where: dict[str, int | str]  # parameters of the record
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    is_value: bool = False

    def goal(self, records: Sequence[Record]) -> Goal:
        """With the last of the records that are about it."""
        found = [r for r in records if r.metric == self.metric and self._is_about(r)]
        value = (found[-1].value if self.is_value else found[-1].ratio) if found else None
        return Goal(self.text, value, self.at_least, self.at_most)

    def _is_about(self, record: Record) -> bool:
        return record.params["setup"] == FREEKV and all(record.params[k] == v for k, v in self.where.items())


_16K = {"phase": MEMORY, "workload": "memory", "context": 16384}
_WANTED = (
    _Wanted(
        "decode throughput at 32K, batch 8, times plain SGLang's",
        {"phase": SERIES, "workload": "context", "context": 32768, "requests": 8},
        "decode_throughput",
        at_least=4,
    ),
    _Wanted(
        "output throughput of short requests, times plain SGLang's",
        {"phase": TRAFFIC, "workload": "short"},
        "output_throughput",
        at_least=0.9,
    ),
    _Wanted(
        "time to first token with a shared prefix of 16K (p50), times plain SGLang's",
        {"phase": TRAFFIC, "workload": "prefix", "prefix": 16384},
        "ttft_p50",
        at_most=1.2,
    ),
    _Wanted(
        "requests at once in equal device bytes at 16K, times plain SGLang's", _16K, "peak_concurrency", at_least=4
    ),
    _Wanted("share of those requests that finished", _16K, "finished", at_least=1, is_value=True),
)


def goals_of(records: Sequence[Record]) -> list[Goal]:
    return [wanted.goal(records) for wanted in _WANTED]
