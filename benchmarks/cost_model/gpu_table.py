"""Tables of predicted steps on cards, the goals beside them, and what would change them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from benchmarks.cost_model.cards import A100, H100, H200, Card
from benchmarks.cost_model.gpu_step import GPUStep, full_attention, gpu_step, under, window_only
from benchmarks.cost_model.model import Model
from benchmarks.cost_model.step_time import Setting
from benchmarks.cost_model.traffic import SOURCES, Traffic, measured_traffic
from benchmarks.goals import Goal, goals_table
from benchmarks.gpu.decode_cells import LEAST_OF_FULL, MOST_OF_WINDOW, STEP_CELLS, K
from benchmarks.tables.table import Lines, Table
from sglang_freekv.config import FreeKVConfig

MODEL = Model.load("llama-3.1-8b")
CONFIG = FreeKVConfig()
CELLS = sorted(STEP_CELLS, key=lambda cell: (cell[1], cell[0]))
_PARTS = ("launches", "scan", "correction", "exposed_link", "beside", "link")
_TRAFFIC_RECORDS = tuple(source for source in SOURCES if source.startswith(("rules", "intervals")))
_AT_INTERVALS = replace(CONFIG, score_interval=8)  # of the records "intervals"


def predicted(card: Card, batch: int, context: int, config: FreeKVConfig, traffic: Traffic) -> dict[str, GPUStep]:
    """Steps of window-only, full and FreeKV's attention."""
    setting = Setting(context, batch, config)
    return {
        "window": gpu_step(card, MODEL, window_only(setting)),
        "full": gpu_step(card, MODEL, full_attention(setting)),
        "freekv": gpu_step(card, MODEL, under(traffic, setting, MODEL)),
    }


def steps_table(cards: Iterable[Card], config: FreeKVConfig, traffic: Traffic) -> Table:
    """A line for each card and cell: three steps in milliseconds, their ratios, and what FreeKV's parts take."""
    parts = [f"{name.replace('_', ' ')} ms" for name in _PARTS]
    lines: Lines = [["card", "batch", "context", "window only ms", "full ms", "FreeKV ms"]]
    lines[0] += ["FreeKV / window only", "full / FreeKV", *parts]
    for card in cards:
        for batch, context in CELLS:
            steps = predicted(card, batch, context, config, traffic)
            own = steps["freekv"]
            cells = [_ms(steps[name].seconds) for name in ("window", "full", "freekv")]
            cells += [f"{own.seconds / steps['window'].seconds:.2f}", f"{steps['full'].seconds / own.seconds:.2f}"]
            cells += [_ms(getattr(own, name)) for name in _PARTS]
            lines.append([card.name, str(batch), f"{context:,}", *cells])
    return Table(lines, (_assumptions(traffic),))


def goals_of(card: Card, config: FreeKVConfig, traffic: Traffic) -> list[Goal]:
    """The goals of the step, as far as they are predicted."""
    goals = []
    for batch, context in CELLS:
        steps = predicted(card, batch, context, config, traffic)
        own, where = steps["freekv"].seconds, f"batch {batch}, {context // K}K"
        if most := MOST_OF_WINDOW.get((batch, context)):
            goals.append(Goal(f"{where}: FreeKV / window only", own / steps["window"].seconds, at_most=most))
        if least := LEAST_OF_FULL.get((batch, context)):
            goals.append(Goal(f"{where}: full attention / FreeKV", steps["full"].seconds / own, at_least=least))
    return goals


def goals_by_record() -> Table:
    """The goals on an H200, by each record of real text that has the default rule, or has it at intervals."""
    lines: Lines = []
    for source in _TRAFFIC_RECORDS:
        config = _AT_INTERVALS if source.startswith("intervals") else CONFIG
        header, *body = goals_table(goals_of(H200, config, measured_traffic(source=source))).lines
        context, budget = SOURCES[source]
        lines = lines or [["traffic of", *header]]
        lines += [[f"{source}: {context:,} tokens, budget {budget:,}", *line] for line in body]
    return Table(lines)


def what_if() -> Table:
    """The same cells on an H200 with one thing changed."""
    traffic = measured_traffic()
    changes: dict[str, tuple[FreeKVConfig, Traffic]] = {
        "the default": (CONFIG, traffic),
        "scored after up to 8 steps, its own traffic": (
            _AT_INTERVALS,
            measured_traffic(source="intervals_8k_long"),
        ),
        "the same, traffic of a budget of 2,048": (
            _AT_INTERVALS,
            measured_traffic(source="intervals_2k_long"),
        ),
        "a quarter of the recalls exposed": (CONFIG, replace(traffic, exposed_share=0.25)),
        "no recall exposed": (CONFIG, replace(traffic, exposed_share=0.0)),
        "half of the turnover": (CONFIG, replace(traffic, turnover=traffic.turnover / 2)),
        "a first level of groups, 5 candidates": (replace(CONFIG, candidates=5), traffic),
        "both: a quarter exposed, 5 candidates": (replace(CONFIG, candidates=5), replace(traffic, exposed_share=0.25)),
        "cosine 0.9 and codes, its own traffic": (
            replace(CONFIG, selector="codes", tau=0.9),
            measured_traffic("freekv-0.9", "rules_long"),
        ),
    }
    cells = [f"batch {batch}, {context // K}K" for batch, context in CELLS]
    lines = [["H200", *(f"{cell}: ms, / window only, full /" for cell in cells)]]
    for name, (config, of_it) in changes.items():
        lines.append([name, *(_short(predicted(H200, *cell, config, of_it)) for cell in CELLS)])
    return Table(lines)


def _short(steps: dict[str, GPUStep]) -> str:
    own = steps["freekv"].seconds
    return f"{_ms(own)}, {own / steps['window'].seconds:.2f}, {steps['full'].seconds / own:.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _assumptions(t: Traffic) -> str:
    return (
        f"Predictions, nothing is measured on a GPU. {MODEL.name}, budget {CONFIG.budget_tokens:,}. Traffic: "
        f"{t.turnover:.1%} of the selected pages change in a step, {t.exposed_share:.0%} of what is recalled is waited "
        f"for, {t.flagged_share:.0%} of the rows are corrected."
    )


TABLES = {
    "gpu-step": lambda: replace(steps_table((H200, H100, A100), CONFIG, measured_traffic()), conditions=()),
    "gpu-goals": goals_by_record,
    "gpu-what-if": what_if,
}


def printed(cards: Sequence[Card], config: FreeKVConfig, traffic: Traffic) -> str:
    """For a terminal."""
    steps = steps_table(cards, config, traffic)
    goals = [f"{card.name}\n{goals_table(goals_of(card, config, traffic)).text()}" for card in cards]
    return "\n".join([steps.text(), *goals, *steps.conditions])
