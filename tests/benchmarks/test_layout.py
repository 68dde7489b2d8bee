"""Commands and libraries can be told apart: a command is a package, and only its `__main__` reads a command line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
COMMANDS = sorted(path.parent.name for path in BENCHMARKS.glob("*/__main__.py"))
# Processes that another command starts, never a user.
CHILDREN = {BENCHMARKS / "cost_model" / "measure.py", BENCHMARKS / "gpu" / "engine_job.py"}


def test_only_the_main_module_of_a_package_is_a_command():
    started = {path for path in BENCHMARKS.rglob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert {path for path in started if path.name != "__main__.py"} == CHILDREN
    assert {path.parent.parent for path in started - CHILDREN} == {BENCHMARKS}


def test_the_readme_names_every_command():
    text = (BENCHMARKS / "README.md").read_text() + (ROOT / "Makefile").read_text()
    assert set(COMMANDS) <= set(re.findall(r"-m benchmarks\.(\w+)", text))


def test_commands_in_documents_and_makefile_exist():
    files = [ROOT / "Makefile", *BENCHMARKS.glob("*.md"), *BENCHMARKS.glob("*/*.md")]
    texts = [path.read_text().partition("<details>")[0] for path in files]  # conditions name the commands of their time
    named = {name for text in texts for name in re.findall(r"-m benchmarks\.([\w.]+\w)", text)}
    assert len(named) > 5 and named <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_how_it_is_called(command):
    docstring = ast.get_docstring(ast.parse((BENCHMARKS / command / "__main__.py").read_text()))
    assert f"python -m benchmarks.{command}" in docstring
