"""The report of a run: what passed, which goals were met, and every number."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.goals import Goal, goals_table
from benchmarks.gpu.decode_cells import (
    DEFAULT,
    EXACT,
    LEAST_OF_FULL,
    MOST_OF_WINDOW,
    MOVING,
    SPECULATION,
    STEP_CELLS,
    TARGETS_MB,
    WINDOWS,
    K,
)
from benchmarks.gpu.phases import PHASES, STAGES
from benchmarks.records import Record, read_records
from benchmarks.tables.table import Lines, Table, latest, number

_TITLES = {
    "check": "Checks",
    "step_estimate": "Estimated decode step, attention by a stand-in",
    "layer_time": "A layer of it",
    "stack_step": "Decode step of a stack with FlashInfer, by settings",
    "decode_step": "Time of a decode step",
    "decode_throughput": "Decode throughput",
    "kernel_time": "Kernels, each as one of several in a CUDA graph, cold L2",
    "attention_time": "Attention, CUDA graph, cold L2",
    "recall_rate": "Recall from the host store",
    "rate_beside_decode": "Rate of the link beside decode",
    "decode_beside_transfer": "Decode beside the link",
    "recall_rate_token_major": "Recall, were the store token-major",
}
# -> what is measured of it
_PREDICTED = {"predicted_step": ("step_estimate", "stack_step"), "predicted_kernel": ("kernel_time",)}
_HIDDEN = {"recall_time", "freekv_state", "explained_step", *_PREDICTED}  # in the records
# Parameters that were measured, too: they do not say which number it is.
_MEASURED = {
    "p20",
    "p80",
    "detail",
    "gbytes_per_s",
    "mbytes",
    "share_of_peak",
    "share_of_link",
    "drift",
    "steps",
    "quiet",
}
_MEASURED |= {"flagged", "recalled_mb", "demand_misses", "hit_share", "kv_gbytes", "shares_pages", "largest"}


class Numbers:
    """The latest record of each metric and parameters."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = latest(records, without=_MEASURED)

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


def goals_of(n: Numbers, stages: Collection[int] = STAGES) -> list[Goal]:
    """Ratios of the latest numbers of the stages, and of others where they are known."""
    goals = {0: (_estimate_goals, _recall_goals), 1: (_stack_goals,), 2: (_step_goals, _throughput_goals, _shown)}
    found = ((stage, goal) for stage, makers in goals.items() for make in makers for goal in make(n))
    return [goal for stage, goal in found if stage in stages or goal.value is not None]


def _estimate_goals(n: Numbers, metric: str = "step_estimate", name: str = "estimated step") -> Iterator[Goal]:
    """Of a step with the same attention on all sides."""

    def step(mode: str, batch: int, context: int) -> float | None:
        params = {"moves": MOVING, **_own(metric)} if mode == "freekv" else {}
        return n.find(metric, mode=mode, batch=batch, context=context, **params)

    for cell in STEP_CELLS:
        value, where = ratio(step("freekv", *cell), step("window", *cell)), f"{cell[1] // K}K, batch {cell[0]}"
        yield Goal(f"{name} over window only, {where}", value, at_most=MOST_OF_WINDOW.get(cell))
    for cell in STEP_CELLS:
        value, where = ratio(step("full", *cell), step("freekv", *cell)), f"{cell[1] // K}K, batch {cell[0]}"
        yield Goal(f"{name}: full attention / FreeKV, {where}", value, at_least=LEAST_OF_FULL.get(cell))


_stack_goals = partial(_estimate_goals, metric="stack_step", name="step of a stack with FlashInfer")


def _own(metric: str) -> dict[str, str]:
    """What tells FreeKV's default from its other settings."""
    return {"settings": "default"} if metric == "stack_step" else {}


def _recall_goals(n: Numbers) -> Iterator[Goal]:
    link = n.find("link_copy", direction="to the GPU")
    bound = 50 if link is None else min(50, 0.9 * link)
    yield Goal("recall rate, GB/s, best; wanted: 50, or 90 % of the link's peak", n.best("recall_rate"), at_least=bound)


def _step_goals(n: Numbers) -> Iterator[Goal]:
    """FreeKV recalls some 26 MB per request and step unless the line says otherwise."""
    plain, freekv = partial(n.step, "plain"), partial(n.step, "freekv")
    for mb in TARGETS_MB:
        value = ratio(freekv(32 * K, 8, target_mb=mb), plain(2 * K, 8))
        bound = 1.08 if mb == TARGETS_MB[0] else None
        yield Goal(f"step over plain at 2K (the ideal), 32K, batch 8, {mb} MB", value, at_most=bound)
    faster = ratio(plain(32 * K, 1), freekv(32 * K, 1))
    yield Goal("batch 1, 32K: plain step / FreeKV step", faster, at_least=1.0)
    yield Goal("the same, every page resident", ratio(plain(32 * K, 1), freekv(32 * K, 1, windows=0)), at_least=1.0)
    faster = ratio(plain(128 * K, 1), freekv(128 * K, 1))
    yield Goal("batch 1, 128K: plain step / FreeKV step", faster, at_least=1.5)


def _throughput_goals(n: Numbers) -> Iterator[Goal]:
    plain, freekv = partial(n.step, "plain"), partial(n.step, "freekv")
    for mb in TARGETS_MB:
        faster = ratio(plain(32 * K, 23), freekv(32 * K, 23, target_mb=mb))
        yield Goal(f"batch 23, 32K, memory not capped: throughput over plain, {mb} MB", faster, at_least=2.5)
    capped = n.find("capped_batch", mode="plain")
    slow = plain(32 * K, int(capped)) if capped else None
    for mb in TARGETS_MB:
        faster = ratio(ratio(23, freekv(32 * K, 23, target_mb=mb)), ratio(capped, slow))
        yield Goal(f"24 GB of KV, 32K: batch 23 over plain's {capped or 0:.0f}, {mb} MB", faster, at_least=4.5)


def _shown(n: Numbers) -> Iterator[Goal]:
    """What has no bound."""
    freekv = partial(n.step, "freekv")
    exposed = freekv(32 * K, 8, tau=SPECULATION), freekv(32 * K, 8, tau=SPECULATION, target_mb=0)
    tail = None if None in exposed else exposed[0] - exposed[1]
    yield Goal("speculation, 32K, batch 8: ms that recall adds to a step that recalls nothing", tail)
    yield Goal("exact step / FreeKV step, 32K, batch 4", ratio(freekv(32 * K, 4, tau=EXACT), freekv(32 * K, 4)))
    yield Goal("two windows of blocks / three, 32K, batch 8", ratio(freekv(32 * K, 8, windows=2), freekv(32 * K, 8)))
    head_major, token_major = (n.best(name, misses=16384) for name in ("recall_rate", "recall_rate_token_major"))
    yield Goal("recall of head-major runs / token-major, 16384 pairs", ratio(head_major, token_major))


def tables_of(n: Numbers, results: dict[str, str]) -> dict[str, Table]:
    """Everything, by title."""
    stages = {phase.stage for phase in PHASES if phase.name in results}
    tables = {
        "Phases of this run": Table([["phase", "result"], *([name, result] for name, result in results.items())]),
        "Goals": goals_table(goals_of(n, stages)),
        "Predicted before, and measured": predictions_table(n),
    }
    others: Lines = [["what", "value", "unit", ""]]
    for metric in dict.fromkeys([*_TITLES, *(r.metric for r in n.records)]):
        records = [r for r in n.records if r.metric == metric and metric not in _HIDDEN]
        if metric not in _TITLES:
            others += [[metric, _cell(r.value), r.unit, _described(r)] for r in records]
        elif records:
            columns = list(dict.fromkeys(name for r in records for name in r.params))
            lines = [[*(_cell(r.params.get(c)) for c in columns), _cell(r.value)] for r in records]
            tables[_TITLES[metric]] = Table([[*columns, records[0].unit], *lines])
    return {**tables, "Other numbers": Table(others)}


def predictions_table(n: Numbers) -> Table:
    """A line for each prediction; last what is predicted with the traffic that the step turned out to have."""
    lines: Lines = [["measured", "", "predicted", "found", "found / predicted", "predicted by its own traffic"]]
    known = {r.metric for r in n.records}
    for r in (r for r in n.records if r.metric in _PREDICTED):
        is_freekv = r.params.get("mode") == "freekv"
        explained = n.find("explained_step", **r.params) if is_freekv else None
        for metric in [metric for metric in _PREDICTED[r.metric] if metric in known]:
            measured = n.find(metric, **r.params, **(_own(metric) if is_freekv else {}))
            values = [f"{_cell(r.value)} {r.unit}", _cell(measured), _cell(ratio(measured, r.value)), _cell(explained)]
            lines.append([metric, _described(r), *values])
    return Table(lines)


def _described(record: Record) -> str:
    return ", ".join(f"{name} {_cell(value)}" for name, value in record.params.items())


def _cell(value: float | str | None) -> str:
    return number(value, digits=4) if isinstance(value, float) else "" if value is None else str(value)


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
    for title, table in tables.items():
        lines += [f"## {title}", "", table.markdown()]
    (out / "report.md").write_text("\n".join(lines))
    note = "A REHEARSAL: nothing here is a measurement\n" if is_rehearsal else ""
    tables |= {title: tables.pop(title) for title in ("Phases of this run", "Goals")}
    return note + "\n".join(f"\n{title}\n{'-' * len(title)}\n{table.text()}" for title, table in tables.items())
