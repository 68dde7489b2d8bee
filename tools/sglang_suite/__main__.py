"""Run SGLang's own tests that need no GPU:  python -m tools.sglang_suite --source FOLDER [--write] [WORD ...]

FOLDER is a checkout of SGLang's sources at the installed release; its tests are not in the wheel. Each file runs twice,
on plain SGLang and with the plug-in active, and the two are compared, test by test. `results.md` says how.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from tools.sglang_suite.files import LEFT_OUT, SUITES
from tools.sglang_suite.table import SIDES, Outcomes, counts, differences, outcomes_path, table

TABLE = Path(__file__).with_name("results.md")
_ROOT = TABLE.parents[2]
_CPU_PLATFORM = "freekv_cpu"  # the only plug-in on the plain side


def find_files(source: Path, words: list[str]) -> dict[str, list[str]]:
    """List the files of each suite, relative to test/registered; with `words`, those whose path has one of them.

    Raises
    ------
    SystemExit
        If the folder has not all suites.
    """
    registered = source / "test/registered"
    found = {}
    for suite, parts in SUITES.items():
        paths = [path for part in parts for path in sorted((registered / part).rglob("test_*.py"))]
        paths += [registered / part for part in parts if (registered / part).is_file()]
        if not paths:
            raise SystemExit(
                f"error: {registered} has no tests of {suite}; give the root of SGLang's sources, "
                f"as of: git clone --branch v{version('sglang')} https://github.com/sgl-project/sglang"
            )
        files = [str(path.relative_to(registered)) for path in paths]
        found[suite] = [file for file in files if not words or any(word in file for word in words)]
    return found


def run_side(side: str, registered: Path, out: Path, files: list[str]) -> Iterator[tuple[str, Outcomes]]:
    """Run files on one side, one after the other; yields each with its outcomes, first those that `out` has already."""
    out.mkdir(parents=True, exist_ok=True)
    there = {file: json.loads(path.read_text()) for file in files if (path := outcomes_path(out, file)).exists()}
    yield from there.items()
    if not (files := [file for file in files if file not in there]):
        return
    env = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # tests start `sglang`
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",  # the tensors are tiny
        "HF_HUB_OFFLINE": "1",  # what would be downloaded fails at once
    }
    if side == "plain":
        env["SGLANG_PLUGINS"] = _CPU_PLATFORM
    command = [sys.executable, "-m", "tools.sglang_suite.one_side", side, str(registered), str(out), *files]
    with (
        (out / "log").open("w") as log,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True, cwd=out) as process,
    ):
        for line in process.stdout:
            file, outcomes = json.loads(line)
            print(f"{side}: {file}: {counts(outcomes)}", flush=True)
            yield file, outcomes
    if process.returncode:
        raise SystemExit(f"error: nothing more runs on the side {side}:\n{(out / 'log').read_text()[-2000:]}")


def main() -> int:
    """Return 1 where a test ends differently with the plug-in."""
    parser = argparse.ArgumentParser(prog="python -m tools.sglang_suite", description=__doc__.partition(":")[0])
    parser.add_argument("--source", type=Path, required=True, help="root of a checkout of SGLang's sources")
    parser.add_argument("--out", type=Path, help="keep logs and outcomes there; what it has already is not run again")
    parser.add_argument("--collect", action="store_true", help="run nothing, tell what --out has of both sides")
    parser.add_argument("--write", action="store_true", help=f"write the table to {TABLE.name}, beside this command")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only files whose path contains one of these")
    arguments = parser.parse_args()
    source = arguments.source.resolve()
    suites = find_files(source, arguments.words)
    files = [file for group in suites.values() for file in group if file not in LEFT_OUT]
    with tempfile.TemporaryDirectory() as folder:
        out = (arguments.out or Path(folder)).resolve()
        if arguments.collect:
            files = [file for file in files if all(outcomes_path(out / side, file).exists() for side in SIDES)]
        results = {side: dict(run_side(side, source / "test/registered", out / side, files)) for side in SIDES}
    text = table(results, suites, source)
    print(text, end="")
    if arguments.write:
        TABLE.write_text(text, encoding="utf-8")
    return int(any(differences(*(results[side][file] for side in SIDES)) for file in files))


if __name__ == "__main__":
    sys.exit(main())
