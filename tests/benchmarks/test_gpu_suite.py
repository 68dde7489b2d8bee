"""The GPU suite is rehearsed where there is no GPU, so that its first run on one does not fail over a typing error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import parse_args
from benchmarks.gpu.phases import PHASES
from benchmarks.gpu.report import Numbers, goals_of
from benchmarks.gpu.suite import Suite, write_entry_points
from benchmarks.records import RecordWriter, read_records

ROOT = Path(__file__).parents[2]


def rehearse(folder: Path, *phases: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--only", ",".join(phases)]
    environment = os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("suite")
    done = rehearse(folder, "env", "link")
    (out,) = folder.glob("rehearsal-*")
    return done, out


def test_a_rehearsal_passes_and_shows_goals(rehearsal):
    done, out = rehearsal
    assert done.returncode == 0, done.stdout[-4000:]
    assert "all phases passed" in done.stdout
    assert "## Goals" in (out / "report.md").read_text()


def test_nothing_in_a_rehearsal_looks_like_a_measurement(rehearsal):
    done, out = rehearsal
    records = read_records(out / "gpu_suite.jsonl")
    assert {"recall_rate", "link_copy"} <= {record.metric for record in records}
    assert all(record.environment["rehearsal"] is True for record in records)
    assert all("python -m benchmarks.gpu --out DIR --only" in record.command for record in records)
    assert all("--rehearse" in record.command for record in records)
    assert "A REHEARSAL" in done.stdout
    assert not list((ROOT / "benchmarks" / "results").glob("gpu_suite*"))


def test_a_phase_that_fails_does_not_stop_the_others(tmp_path: Path):
    suite = Suite(tmp_path, ["--rehearse", "--model-shape", "no such shape"], budget=60)
    env, link = (phase for phase in PHASES if phase.name in ("env", "link"))
    suite.run([env, link])
    assert suite.results == {"env": "FAILED with exit status 2", "link": "FAILED with exit status 2"}


def test_a_phase_without_enough_time_is_skipped_and_says_so(tmp_path: Path):
    suite = Suite(tmp_path, ["--rehearse"], budget=1)
    suite.run([PHASES[0]])
    assert suite.results["env"].startswith("skipped")


def test_a_phase_is_a_command_of_its_own_with_its_own_limit():
    phase = parse_args(["link", "--out", "d", "--rehearse"])
    limit = next(phase.seconds for phase in PHASES if phase.name == "link")
    assert (phase.phase, phase.out, phase.seconds, phase.rehearse) == ("link", Path("d"), limit, True)
    assert parse_args(["link", "--out", "d", "--seconds", "40"]).seconds == 40
    suite = parse_args(["--only", "env,link"])
    assert (suite.phase, suite.phases, suite.minutes) == (None, ["env", "link"], 9)


def test_wrong_command_lines_are_refused_before_anything_large_is_imported():
    program = (
        "import sys, runpy\n"
        "try: runpy.run_module('benchmarks.gpu', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "--only", "lonk"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
    assert "--only names lonk; the phases are env, " in done.stderr
    assert done.stdout == "2 False\n"


def test_what_a_phase_needs_comes_before_it():
    for index, phase in enumerate(PHASES):
        assert set(phase.needs) <= {earlier.name for earlier in PHASES[:index] if earlier.is_background}


def test_sglang_finds_the_plug_ins_where_the_package_is_not_installed(tmp_path: Path):
    folder = write_entry_points(tmp_path)
    program = "import importlib.metadata as m; print([e.value for e in m.entry_points(group='sglang.srt.plugins')])"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    assert "freekv_patches.plugin:register" in done.stdout


def test_goals_are_judged_by_the_latest_numbers(tmp_path: Path):
    writer = RecordWriter("gpu_suite", tmp_path / "gpu_suite.jsonl")
    sizes = {"context": 32768, "batch": 1}
    for plain_ms, freekv_ms in ((1.0, 2.0), (6.0, 5.0)):
        writer.write("decode_step", plain_ms, "ms", {"mode": "plain", **sizes, "p20": plain_ms})
        freekv = {"mode": "freekv", **sizes, "tau": 0.9, "target_mb": 26, "windows": 3}
        writer.write("decode_step", freekv_ms, "ms", {**freekv, "flagged": 0.2})
    goals = {goal.name: goal for goal in goals_of(Numbers(read_records(writer.path)))}
    assert goals["batch 1, 32K: plain step / FreeKV step"].value == 1.2
    assert goals["batch 1, 32K: plain step / FreeKV step"].verdict == "met"
    assert goals["batch 1, 128K: plain step / FreeKV step"].verdict == "not measured"
