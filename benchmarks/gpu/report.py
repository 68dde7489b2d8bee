"""The report of a run: what passed, which goals were met, and every number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.decode_cells import DEFAULT, EXACT, SPECULATION, WINDOWS, K
from benchmarks.records import Record, read_records

_TITLES = {
    "check": "Checks",
    "decode_step": "Time of a decode step",
    "decode_throughput": "Decode throughput",
    "kernel_time": "Kernels, CUDA graph, cold L2",
    "attention_time": "Attention, CUDA graph, cold L2",
    "recall_rate": "Recall from the host store",
    "recall_rate_token_major": "Recall, were the store token-major",
}
_HIDDEN = {"recall_time", "freekv_state"}  # in the records
# Parameters that were measured, too: they do not say which number it is.
_MEASURED = {"p20", "p80", "detail", "gbytes_per_s", "mbytes", "share_of_peak", "share_of_link", "drift", "steps"}
_MEASURED |= {"flagged", "recalled_mb", "demand_misses", "hit_share", "kv_gbytes", "shares_pages", "largest"}


@dataclass(frozen=True)
class Goal:
    """What was hoped for. `value` is None where a number that it needs is missing."""

    name: str
    value: float | None
    wanted: str
    is_met: bool | None

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "" if self.is_met is None else "met" if self.is_met else "MISSED"


class Numbers:
    """The latest record of each metric and parameters."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list({self._identity(r): r for r in records}.values())

    @staticmethod
    def _identity(record: Record) -> tuple:
        params = {name: value for name, value in record.params.items() if name not in _MEASURED}
        return record.metric, *sorted(params.items())

    def find(self, metric: str, **params: int | float | str) -> float | None:
        """The latest value with these parameters, whatever the others are."""
        values = [r.value for r in self.records if r.metric == metric and params.items() <= r.params.items()]
        return values[-1] if values else None

    def step(self, mode: str, context: int, batch: int, **params: int | float) -> float | None:
        """Milliseconds of a decode step; FreeKV with its defaults unless `params` say otherwise."""
        if mode == "freekv":
            params = {"tau": DEFAULT, "target_mb": 26, "windows": WINDOWS} | params
        return self.find("decode_step", mode=mode, context=context, batch=batch, **params)

    def best(self, metric: str, **params: int) -> float | None:
        return max(
            (r.value for r in self.records if r.metric == metric and params.items() <= r.params.items()), default=None
        )


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def at_least(name: str, value: float | None, wanted: float) -> Goal:
    return Goal(name, value, f">= {wanted:g}", None if value is None else value >= wanted)


def goals_of(n: Numbers) -> list[Goal]:
    """Ratios of the latest numbers; FreeKV recalls some 26 MB per request and step unless the line says otherwise."""
    plain, freekv = (lambda *c, **p: n.step("plain", *c, **p)), (lambda *c, **p: n.step("freekv", *c, **p))
    recall, link = n.best("recall_rate"), n.find("link_copy", direction="to the GPU")
    is_met = None if recall is None else recall >= 50 or bool(link and recall >= 0.9 * link)
    goals = [Goal("recall rate, GB/s, best", recall, ">= 50, or >= 90 % of the link's peak", is_met)]
    for mb in (13, 26, 48):
        value = ratio(freekv(32 * K, 8, target_mb=mb), plain(2 * K, 8))
        wanted, met = ("<= 1.08", value is not None and value <= 1.08) if mb == 13 else ("", None)
        goals.append(Goal(f"step over plain at 2K (the ideal), 32K, batch 8, {mb} MB", value, wanted, met))
    goals += [
        at_least("batch 1, 32K: plain step / FreeKV step", ratio(plain(32 * K, 1), freekv(32 * K, 1)), 1.0),
        at_least("the same, every page resident", ratio(plain(32 * K, 1), freekv(32 * K, 1, windows=0)), 1.0),
        at_least("batch 1, 128K: plain step / FreeKV step", ratio(plain(128 * K, 1), freekv(128 * K, 1)), 1.5),
    ]
    for mb in (13, 26, 48):
        faster = ratio(plain(32 * K, 23), freekv(32 * K, 23, target_mb=mb))
        goals.append(at_least(f"batch 23, 32K, memory not capped: throughput over plain, {mb} MB", faster, 2.5))
    capped = n.find("capped_batch", mode="plain")
    slow = plain(32 * K, int(capped)) if capped else None
    for mb in (13, 26, 48):
        fast = freekv(32 * K, 23, target_mb=mb)
        faster = ratio(ratio(23, fast), ratio(capped, slow))
        goals.append(at_least(f"24 GB of KV, 32K: batch 23 over plain's {capped or 0:.0f}, {mb} MB", faster, 4.5))
    exposed = freekv(32 * K, 8, tau=SPECULATION), freekv(32 * K, 8, tau=SPECULATION, target_mb=0)
    tail = None if None in exposed else exposed[0] - exposed[1]
    goals += [
        Goal("speculation, 32K, batch 8: ms that recall adds to a step that recalls nothing", tail, "", None),
        Goal(
            "exact step / FreeKV step, 32K, batch 4", ratio(freekv(32 * K, 4, tau=EXACT), freekv(32 * K, 4)), "", None
        ),
        Goal(
            "two windows of blocks / three, 32K, batch 8",
            ratio(freekv(32 * K, 8, windows=2), freekv(32 * K, 8)),
            "",
            None,
        ),
        Goal(
            "recall of head-major runs / token-major, 16384 pairs",
            ratio(n.best("recall_rate", misses=16384), n.best("recall_rate_token_major", misses=16384)),
            "",
            None,
        ),
    ]
    return goals


def tables_of(n: Numbers, results: dict[str, str]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of everything."""
    tables = [("Phases of this run", ["phase", "result"], [[name, result] for name, result in results.items()])]
    goals = [[g.name, _number(g.value), g.wanted, g.verdict] for g in goals_of(n)]
    tables.append(("Goals", ["what", "value", "goal", ""], goals))
    metrics = dict.fromkeys([*_TITLES, *(r.metric for r in n.records)])
    others: list[list[str]] = []
    for metric in metrics:
        records = [r for r in n.records if r.metric == metric and metric not in _HIDDEN]
        if metric not in _TITLES:
            others += [[metric, _number(r.value), r.unit, _described(r)] for r in records]
        elif records:
            columns = list(dict.fromkeys(name for r in records for name in r.params))
            rows = [[*(_number(r.params.get(c)) for c in columns), _number(r.value)] for r in records]
            tables.append((_TITLES[metric], [*columns, records[0].unit], rows))
    tables.append(("Other numbers", ["what", "value", "unit", ""], others))
    return tables


def _described(record: Record) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in record.params.items())


def _number(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def write_report(out: Path, results: dict[str, str]) -> str:
    """Write DIR/report.md, and return the same for a terminal, the most wanted part last."""
    path = out / "gpu_suite.jsonl"
    records = read_records(path) if path.exists() else []
    is_rehearsal = any(r.environment.get("rehearsal") for r in records)
    tables = tables_of(Numbers(records), results)
    lines = ["# GPU suite", ""]
    if is_rehearsal:
        lines += ["**A rehearsal on a CPU: nothing here is a measurement.**", ""]
    elif records:
        e = records[-1].environment
        machine = f"{e['gpu']}, driver {e.get('driver')}, link generation {e.get('link_generation_max')}"
        lines += [f"{machine} x{e.get('link_width')}, torch {e['torch']}, sglang {e['sglang']}", ""]
        lines += [f"commit {records[-1].commit}, {records[-1].time}", ""]
    for title, header, rows in tables:
        body = [header, ["---"] * len(header), *rows]
        lines += [f"## {title}", "", *(f"| {' | '.join(row)} |" for row in body), ""]
    (out / "report.md").write_text("\n".join(lines))
    note = "A REHEARSAL: nothing here is a measurement\n" if is_rehearsal else ""
    return note + "\n".join(_as_text(*table) for table in [*tables[2:], *tables[:2]])


def _as_text(title: str, header: list[str], rows: list[list[str]]) -> str:
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return f"\n{title}\n{'-' * len(title)}\n" + "\n".join(lines)
