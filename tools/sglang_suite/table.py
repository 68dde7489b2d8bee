"""Outcomes of both sides as a markdown table."""

from __future__ import annotations

import subprocess
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tools.sglang_suite.files import LEFT_OUT

Outcomes = dict[str, tuple[str, str]]  # test -> passed, failed or skipped, and the reason
Results = dict[str, dict[str, Outcomes]]  # side -> file -> outcomes

SIDES = ("plain", "plug-in")

_ABSENT = ("absent", "")
_METHOD = """\
Each file ran twice: on plain SGLang, and with the plug-in active. There, all its hooks are in place, tests that build
SGLang's radix cache or paged allocator get those of this package, and servers that tests start run with
`--kv-retrieval freekv --freekv-audit`. On both sides these servers have a tiny model with random weights instead of
the one that they would download, and the CPU platform of this package is in use. Counts are tests
passed / failed / skipped; the last column says what a file lacked on plain SGLang, or why it was not run."""


def outcomes_path(out: Path, file: str) -> Path:
    """Name the file in which one side, whose folder is `out`, keeps the outcomes of a test file."""
    return (out / file.replace("/", ".")).with_suffix(".json")


def table(results: Results, suites: dict[str, list[str]], source: Path) -> str:
    """Say what ran on which sources, with counts by suite and by file, and name every test that ends differently."""
    everything = [file for files in suites.values() for file in files]
    differing = {file: differences(*(results[side][file] for side in SIDES)) for file in results["plain"]}
    lines = ["# SGLang's own tests", "", _sources(source), "", _METHOD, ""]
    lines += [_row("suite", "files run", "not run", *SIDES, "tests that differ"), _row(*["---"] * 6)]
    for suite, files in (*suites.items(), ("all", everything)):
        ran = [file for file in files if file in differing]
        sums = [counts(*(results[side][file] for file in ran)) for side in SIDES]
        lines.append(_row(suite, len(ran), len(files) - len(ran), *sums, sum(len(differing[file]) for file in ran)))
    for suite, files in suites.items():
        lines += ["", f"## {suite}", "", _row("file", *SIDES, "not passed, not run"), _row(*["---"] * 4)]
        for file in files:
            sides = [counts(results[side][file]) if file in differing else "" for side in SIDES]
            lines.append(_row(f"`{file}`", *sides, why_not(file, results["plain"].get(file))))
    found = [line for file in everything for line in differing.get(file, [])]
    return "\n".join([*lines, "", "## Different with the plug-in", "", *(found or ["No test."])]) + "\n"


def counts(*files: Outcomes) -> str:
    """Passed / failed / skipped."""
    number = Counter(outcome for outcomes in files for outcome, _ in outcomes.values())
    return " / ".join(str(number[outcome]) for outcome in ("passed", "failed", "skipped"))


def differences(plain: Outcomes, plug_in: Outcomes) -> list[str]:
    """List the tests whose outcome is not the same on both sides."""
    pairs = {test: (plain.get(test, _ABSENT), plug_in.get(test, _ABSENT)) for test in plain | plug_in}
    return [
        f"- `{test}`: {' '.join(one).strip()} on plain SGLang, {' '.join(other).strip()} with the plug-in"
        for test, (one, other) in pairs.items()
        if one[0] != other[0]
    ]


def why_not(file: str, plain: Outcomes | None) -> str:
    """Say which tests of a file were left out, and why others did not pass on plain SGLang: the commonest reasons."""
    if plain is None and file not in LEFT_OUT:
        return "not run yet"
    left_out = {test: reason for test, reason in LEFT_OUT.items() if test.partition("::")[0] == file}
    said = [f"{test.rpartition('::')[2]}: {why}" if "::" in test else why for test, why in left_out.items()]
    reasons = Counter(why for outcome, why in (plain or {}).values() if outcome != "passed")
    said += [f"{number}: {why}" for why, number in reasons.most_common(3)]
    return "; ".join(said).replace("|", "\\|")


def _sources(source: Path) -> str:
    git = subprocess.run(["git", "-C", str(source), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    installed = Path(find_spec("sglang").origin).parent  # importing it takes long
    files = [path.relative_to(installed) for path in installed.rglob("*.py")]
    there = source / "python/sglang"
    same = sum((there / f).exists() and (there / f).read_bytes() == (installed / f).read_bytes() for f in files)
    return (
        f"Made by `python -m tools.sglang_suite --source SGLANG --write` with sglang {version('sglang')}, torch "
        f"{version('torch')}, without a GPU. The tests are those of commit "
        f"`{git.stdout.strip() or 'unknown'}`; {same} of the {len(files)} Python files of the installed release "
        "are the same there."
    )


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
