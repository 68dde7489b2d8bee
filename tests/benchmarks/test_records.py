"""Records hold what an issue of a number needs, and tables show them as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.records import RecordWriter, describe_commit, fill_tables, read_records

FIELDS = ["name", "params", "metric", "value", "unit", "baseline", "baseline_value", "ratio"]
FIELDS += ["commit", "environment", "command", "time"]
TEMPLATE = "before\n<!-- records speed decode -->\nold\n<!-- end -->\nafter\n"


@pytest.fixture
def writer(tmp_path: Path) -> RecordWriter:
    return RecordWriter("speed", tmp_path / "speed.jsonl")


def fill(writer: RecordWriter) -> str:
    return fill_tables(TEMPLATE, writer.path.parent)


def test_a_line_has_exactly_the_agreed_fields(writer):
    writer.write("decode", 10.0, "tokens/s", {"batch": 8}, baseline="plain", baseline_value=4.0)
    (line,) = writer.path.read_text().splitlines()
    assert list(json.loads(line)) == FIELDS
    assert json.loads(line)["ratio"] == 2.5


def test_what_is_written_is_read_back(writer):
    written = [writer.write("decode", i / 3, "tokens/s", {"batch": i}) for i in range(3)]
    assert read_records(writer.path) == written


def test_the_environment_names_machine_and_versions(writer):
    assert {"cpu", "cores", "ram_gib", "gpu", "python", "torch", "sglang"} <= set(writer.environment)
    assert writer.environment["cores"] >= 1
    assert writer.environment["ram_gib"] > 0


def test_a_baseline_without_its_value_is_refused(writer):
    with pytest.raises(ValueError, match="belong together"):
        writer.write("decode", 1.0, "tokens/s", {}, baseline="plain")


def test_a_line_with_other_fields_is_refused(writer):
    writer.path.write_text('{"name": "speed", "speed": 1}\n')
    with pytest.raises(ValueError, match=r"speed.jsonl:1: .*speed"):
        read_records(writer.path)


def test_losses_stand_beside_wins(writer):
    for batch, value in ((1, 3.0), (8, 16.0)):
        writer.write("decode", value, "tokens/s", {"batch": batch}, baseline="plain SGLang", baseline_value=4.0)
    text = fill(writer)
    assert "| batch | decode (tokens/s) | plain SGLang | ratio |  |" in text
    assert "| 1 | 3 | 4 | 0.75 | **loss** |" in text
    assert "| 8 | 16 | 4 | 4.00 | win |" in text


@pytest.mark.parametrize("unit", ["s", "ms", "bytes"])
def test_less_time_or_memory_is_a_win(writer, unit):
    writer.write("decode", 1.0, unit, {}, baseline="plain", baseline_value=2.0)
    assert "win" in fill(writer)


def test_the_latest_of_equal_measurements_counts(writer):
    writer.write("decode", 1.0, "tokens/s", {"batch": 1, "context": 2})
    writer.write("decode", 5.0, "tokens/s", {"context": 2, "batch": 1})
    assert "| 2 | 1 | 5 |" in fill(writer)
    assert "| 2 | 1 | 1 |" not in fill(writer)


def test_only_the_marked_metric_is_rewritten_and_twice_gives_the_same(writer):
    writer.write("decode", 1.0, "tokens/s", {"batch": 1})
    writer.write("prefill", 77.0, "tokens/s", {"batch": 1})
    text = fill(writer)
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "77" not in text
    assert fill_tables(text, writer.path.parent) == text


def test_a_table_without_records_says_so(tmp_path):
    assert "No records yet." in fill_tables(TEMPLATE, tmp_path)


def test_a_changed_working_tree_is_marked(monkeypatch):
    answers = {"rev-parse": "abc", "status": " M file.py"}
    monkeypatch.setattr("benchmarks.records._git", lambda command, *args: answers[command])
    assert describe_commit() == "abc-dirty"
    answers["status"] = ""
    assert describe_commit() == "abc"
