"""The command that runs SGLang's own tests: its list of files, and what it says. The tests themselves take long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.sglang_suite.__main__ import find_files
from tools.sglang_suite.files import LEFT_OUT, SUITES
from tools.sglang_suite.table import table

_FILE = "unit/mem_cache/test_radix_cache_unit.py"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Sources with one file in each folder of tests, and nothing in it."""
    for part in (part for parts in SUITES.values() for part in parts):
        path = tmp_path / "test/registered" / part
        path = path if path.suffix else path / "test_radix_cache_unit.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize("test", LEFT_OUT)
def test_what_is_left_out_would_be_run_otherwise(test: str) -> None:
    file = Path(test.partition("::")[0])
    assert file.suffix == ".py"
    assert any(file.is_relative_to(part) for parts in SUITES.values() for part in parts)


def test_files_are_found_by_suite_and_chosen_by_words(source: Path) -> None:
    found = find_files(source, ["mem_cache", "sanity"])
    assert [len(files) for files in found.values()] == [2, 0, 1]
    assert _FILE in next(iter(found.values()))


def test_a_folder_without_sglangs_tests_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no tests of .*; give the root of SGLang's sources, as of: git clone"):
        find_files(tmp_path, [])


def test_a_test_that_ends_differently_is_named(source: Path) -> None:
    plain = {f"{_FILE}::test_a": ("passed", ""), f"{_FILE}::test_b": ("skipped", "CUDA required")}
    plug_in = {f"{_FILE}::test_a": ("failed", "it broke"), f"{_FILE}::test_b": ("skipped", "CUDA required")}
    text = table({"plain": {_FILE: plain}, "plug-in": {_FILE: plug_in}}, {"Radix cache": [_FILE]}, source)
    assert f"| `{_FILE}` | 1 / 0 / 1 | 0 / 1 / 1 | 1: CUDA required |" in text
    assert f"- `{_FILE}::test_a`: passed on plain SGLang, failed it broke with the plug-in" in text
