"""Records hold everything that is needed to judge a number and to measure it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.records import RecordWriter, describe_commit, read_records

FIELDS = ["name", "params", "metric", "value", "unit", "baseline", "baseline_value", "ratio"]
FIELDS += ["commit", "environment", "command", "time"]


@pytest.fixture
def writer(tmp_path: Path) -> RecordWriter:
    return RecordWriter("speed", tmp_path / "speed.jsonl")


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


def test_a_changed_working_tree_is_marked(monkeypatch):
    answers = {"rev-parse": "abc", "status": " M file.py"}
    monkeypatch.setattr("benchmarks.records._git", lambda command, *args: answers[command])
    assert describe_commit() == "abc-dirty"
    answers["status"] = ""
    assert describe_commit() == "abc"


def test_where_there_is_no_repository_the_commit_is_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert describe_commit() == "uncommitted"
    monkeypatch.setenv("FREEKV_COMMIT", "abc")
    assert describe_commit() == "abc"
