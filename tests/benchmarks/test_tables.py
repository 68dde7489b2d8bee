"""Tables show records as they are, with losses beside wins and the conditions of every number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.records import RESULTS, RecordWriter
from benchmarks.tables import marked
from benchmarks.tables.__main__ import KINDS, documents
from benchmarks.tables.table import Table, latest, number

TEMPLATE = "before\n<!-- records speed decode -->\nold\n<!-- end -->\nafter\n"
CONDITIONS = "<!-- conditions -->\n<!-- end -->\n"


@pytest.fixture
def writer(tmp_path: Path) -> RecordWriter:
    return RecordWriter("speed", tmp_path / "speed.jsonl")


def fill(writer: RecordWriter, template: str = TEMPLATE) -> str:
    return marked.fill(template, KINDS, writer.path.parent)


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
    assert marked.fill(text, KINDS, writer.path.parent) == text


def test_a_table_without_records_says_so(tmp_path):
    assert "No records yet." in marked.fill(TEMPLATE, KINDS, tmp_path)


def test_records_that_differ_in_what_was_measured_are_equal_too(writer):
    first, _, last = (writer.write("decode", value, "ms", {"batch": 1, "p20": value}) for value in (1.0, 2.0, 3.0))
    other = writer.write("decode", 4.0, "ms", {"batch": 2})
    assert latest([first, other, last], without=["p20"]) == [last, other]


def test_a_text_lists_every_condition_once_and_its_tables_cite_them(writer):
    writer.write("decode", 1.0, "tokens/s", {"batch": 1})
    writer.write("prefill", 2.0, "tokens/s", {"batch": 1})
    other = RecordWriter("speed", writer.path, commit="another", environment=writer.environment)
    other.write("prefill", 3.0, "tokens/s", {"batch": 2})
    text = fill(writer, TEMPLATE + TEMPLATE.replace("decode", "prefill") + CONDITIONS)
    assert text.count("\nconditions [1]\n") == 1
    assert text.count("\nconditions [1], [2]\n") == 1
    assert text.count(f"[1] {writer.environment['cpu']}") == text.count("commit another") == 1
    assert text.index("<details>") > text.index("conditions [1], [2]")
    assert fill(writer, text) == text
    assert "conditions" not in fill(writer), "a text without a list of conditions cites none"


def test_a_marker_that_names_no_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="<!-- speed file x --> names no kind of tables: there are records, "):
        marked.fill("<!-- speed file x -->\n<!-- end -->", KINDS, tmp_path)


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(None, 3, ""), (0.91234, 3, "0.912"), (99.44, 3, "99.4"), (1234.5, 3, "1,234"), (123.44, 4, "123.4")],
)
def test_numbers_have_so_many_digits_that_matter(value, digits, shown):
    assert number(value, digits) == shown


def test_a_table_for_a_terminal_has_its_columns_below_one_another():
    lines = Table([["a", "long title"], ["long cell", "1"]]).text().splitlines()
    assert lines == ["a          long title", "long cell  1"]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_the_committed_tables_are_those_of_the_committed_records(path):
    text = path.read_text()
    assert marked.fill(text, KINDS) == text
    assert "No records yet." not in text


def test_every_file_of_records_is_shown_somewhere():
    shown = {file for path in documents() for file in re.findall(r"<!-- \w+ (\w+) \S+ -->", path.read_text())}
    assert {path.stem for path in RESULTS.glob("*.jsonl")} <= shown
