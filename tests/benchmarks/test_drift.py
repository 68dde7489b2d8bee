"""The audit of drift on constructed queries."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.records import RecordWriter, read_records
from benchmarks.study.capture import Layer
from benchmarks.study.drift import TABLES, TAUS, Drift, draw, measure_layer, merge, records
from benchmarks.study.rules import Rule
from benchmarks.tables.kinds import pivot

_RULE = Rule(page_size=16, sink=16, recent=16)
_STEPS = torch.arange(1, 9)


def _turning(angles: list[float]) -> Layer:
    """Query heads that turn by a constant angle each step; 2 per KV head; the keys of a page are equal."""
    angle = torch.tensor(angles)[:, None] * torch.arange(9)
    q = torch.zeros(len(angles), 9, 8)
    q[..., 0], q[..., 1] = angle.cos(), angle.sin()
    k = torch.randn(len(angles) // 2, 25, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(16, 1)
    return Layer(q, k, k)


def test_cosines_are_those_of_the_turn_and_are_averaged_over_the_group():
    angles = [0.1, 0.5, 1.0, 1.2]
    cosine, similarity, _ = measure_layer(_turning(angles), _STEPS, _RULE, 128)
    expected = torch.tensor(angles).cos()
    torch.testing.assert_close(cosine, expected[:, None].expand(-1, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(similarity, expected.view(2, 2).mean(1)[:, None].expand(-1, 8), atol=1e-5, rtol=0)


def test_queries_that_stand_still_turn_no_page_over():
    _, _, turnover = measure_layer(_turning([0.0] * 4), _STEPS, _RULE, 128)
    assert (turnover == 0).all()


def test_opposite_queries_want_other_pages():
    _, _, turnover = measure_layer(_turning([math.pi] * 4), _STEPS, _RULE, 128)
    assert (turnover == 1).all()


def test_a_threshold_flags_the_rows_below_it():
    drift = Drift("walk", 0, torch.zeros(4, 2), torch.tensor([[0.75, 0.85], [0.95, 0.99]]), torch.zeros(2, 2))
    assert [drift.flagged(tau) for tau in (0.7, 0.8, 0.9, 1.1)] == [0, 0.25, 0.5, 1]


@pytest.fixture
def drifts() -> list[Drift]:
    layer = measure_layer(_turning([0.1, 0.5, 1.0, 1.2]), _STEPS, _RULE, 128)
    return [Drift(family, number, *layer) for family in ("walk", "walk", "lookup") for number in (0, 1)]


def test_transcripts_of_a_family_are_merged(drifts):
    merged = merge(drifts)
    assert [(d.family, d.layer, d.cosine.shape[1]) for d in merged] == [
        ("walk", 0, 16),
        ("walk", 1, 16),
        ("lookup", 0, 8),
        ("lookup", 1, 8),
    ]


def test_records_tables_and_picture_show_every_family_and_layer(drifts, tmp_path):
    merged = merge(drifts)
    flagged = [value for metric, value, _ in records(merged) if metric == "flagged_share"]
    assert len(flagged) == 4 * len(TAUS)
    assert flagged[: len(TAUS)] == sorted(flagged[: len(TAUS)])
    writer = RecordWriter("accuracy.drift", tmp_path / "drift.jsonl")
    for metric, value, params in records(merged):
        writer.write(metric, value, "share", {"context": 512, **params})
    layers, heads = (pivot(read_records(writer.path), table).markdown().splitlines() for table in TABLES)
    assert layers[0] == "| family | layer | cosine | cosine p10 | " + " | ".join(
        [*(f"flagged share {tau}" for tau in TAUS), "page turnover |"]
    )
    assert heads[0] == "| family | layer | " + " | ".join(f"head cosine {head}" for head in range(4)) + " |"
    for lines in (layers, heads):
        assert [line.split(" | ")[:2] for line in lines[2:6]] == [
            [f"| {family}", str(layer)] for family in ("walk", "lookup") for layer in (0, 1)
        ]
    pytest.importorskip("matplotlib")
    draw(merged, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 10_000


def test_a_table_of_records_that_do_not_exist_says_so(tmp_path):
    assert pivot([], TABLES[0]).markdown() == "No records yet.\n"
