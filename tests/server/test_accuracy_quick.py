"""A small accuracy matrix on the trained model: it tells methods apart, and retrieval keeps what full attention has.

The same code as `python -m benchmarks.accuracy`, with short contexts and few sessions.
"""

from __future__ import annotations

import pytest

from benchmarks.accuracy.matrix import Launcher, Matrix, draw_batches
from benchmarks.accuracy.results import Cell, summarize
from benchmarks.accuracy.settings import Layout, settings
from benchmarks.accuracy.tasks import TASKS
from benchmarks.methods import METHODS
from benchmarks.needle import MODEL

CONTEXT, BUDGET, SESSIONS = 4096, 256, 4
LAYOUT = Layout(sink=32, recent=32)
METHOD_NAMES = ("full", "window", "speculation", "freekv")
LOOKUP, WALK, COPY = "multikey", "variables", "scattered"

FULL_AT_LEAST = 0.97
FREEKV_SHARE_AT_LEAST = {LOOKUP: 0.99, WALK: 0.95, COPY: 0.95}
WINDOW_AT_MOST = 0.3
SPECULATION_BELOW_FREEKV = 0.1  # by at least

Table = dict[str, dict[str, Cell]]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Task -> method -> cell. Two servers at a time: each computes with one thread."""
    folder = tmp_path_factory.mktemp("accuracy")
    batches = draw_batches([TASKS[name] for name in (LOOKUP, WALK, COPY)], [CONTEXT], SESSIONS, seed=42, size=SESSIONS)
    chosen = settings([METHODS[name] for name in METHOD_NAMES], [LAYOUT], [BUDGET])
    launcher = Launcher(MODEL, CONTEXT, concurrency=SESSIONS, seed=42, logs=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        results = Matrix(folder / "sessions.jsonl", launcher.start, launcher.digest).run(chosen, batches, servers=2)
    table: Table = {}
    for cell in summarize(results):
        table.setdefault(cell.params["task"], {})[cell.params["method"]] = cell
    return table


def score(table: Table, task: str, method: str) -> float:
    return table[task][method].score.value


@pytest.mark.parametrize("task", FREEKV_SHARE_AT_LEAST)
def test_full_attention_answers(scores: Table, task: str):
    assert score(scores, task, "full") >= FULL_AT_LEAST


@pytest.mark.parametrize("task", FREEKV_SHARE_AT_LEAST)
def test_freekv_keeps_the_score_of_full_attention(scores: Table, task: str):
    assert scores[task]["freekv"].share.value >= FREEKV_SHARE_AT_LEAST[task]


@pytest.mark.parametrize("task", FREEKV_SHARE_AT_LEAST)
def test_sink_and_recent_alone_do_not_answer(scores: Table, task: str):
    assert score(scores, task, "window") <= WINDOW_AT_MOST


@pytest.mark.parametrize("task", [WALK, COPY])
def test_correction_closes_the_gap_of_speculation_where_every_step_needs_another_page(scores: Table, task: str):
    assert score(scores, task, "speculation") <= score(scores, task, "freekv") - SPECULATION_BELOW_FREEKV


def test_correction_is_what_the_counters_say(scores: Table):
    flagged = {method: cell.flagged_share for method, cell in scores[COPY].items()}
    assert flagged["full"] is None
    assert flagged["speculation"] == flagged["window"] == 0
    assert 0 < flagged["freekv"] <= 1
    assert all(cell.absent_pages == 0 for cells in scores.values() for cell in cells.values())
