"""The GPU suite is rehearsed where there is no GPU, so that its first run on one does not fail over a typing error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import parse_args
from benchmarks.gpu.phases import PHASES
from benchmarks.gpu.report import Numbers, goals_of, predictions_table
from benchmarks.gpu.suite import Suite, write_entry_points
from benchmarks.records import RecordWriter, read_records
from freekv_kernels import Ops

ROOT = Path(__file__).parents[2]
WAYS = ["copy", "recall", "copies in a batch", "copies one by one", "in place"]


def on_bare_machine(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python, and what it starts, where only torch, Triton and pytest are installed."""
    path = os.pathsep.join([str(ROOT / "tests/support/bare_machine"), os.environ.get("PYTHONPATH", "")])
    # Plug-ins of pytest are other packages.
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **variables}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Of stage 0, on a machine that has nothing else."""
    folder = tmp_path_factory.mktemp("suite")
    done = on_bare_machine(["-m", "benchmarks.gpu", "stage0", "--rehearse"], TMPDIR=str(folder), OMP_NUM_THREADS="1")
    (out,) = folder.glob("rehearsal-*")
    return done, out


def test_a_bare_machine_has_no_other_package():
    program = """
import sys, torch, triton, pytest
for name in sys.argv[1:]:
    try:
        __import__(name)
    except ImportError as error:
        print(error)
"""
    others = ["sglang", "flashinfer", "transformers", "psutil", "xdist", "hypothesis", "matplotlib"]
    done = on_bare_machine(["-c", program, *others])
    assert done.stdout.splitlines() == [f"No module named '{name}'" for name in others]


@pytest.mark.parametrize("folder", ["benchmarks/gpu", "kernels", "sglang_freekv", "tests/kernels", "tests/support"])
def test_numpy_is_needed_by_tritons_interpreter_alone(folder):
    """Which cannot be told in a rehearsal, as the interpreter has imported it."""
    files = [file for file in (ROOT / folder).rglob("*.py") if ROOT / "tests/support/bare_machine" not in file.parents]
    assert files and not [file.name for file in files if re.search(r"^\s*(import|from) numpy", file.read_text(), re.M)]


def test_a_rehearsal_passes_and_shows_goals(rehearsal):
    done, out = rehearsal
    assert done.returncode == 0, done.stdout[-4000:]
    assert "all phases passed" in done.stdout
    assert "## Goals" in (out / "report.md").read_text()


def test_stage_0_records_the_machine_what_is_right_and_what_each_op_layer_step_and_transfer_takes(rehearsal):
    records = read_records(rehearsal[1] / "gpu_suite.jsonl")
    numbers = {metric: [r for r in records if r.metric == metric] for metric in {r.metric for r in records}}
    assert {"cores", "sanitizer", "claims", "host_order", "empty_kernel", "plan_time", "tail_time"} <= set(numbers)
    assert [r.value for r in numbers["tests_failed"]] == [0] and numbers["tests_passed"][0].value >= 20
    assert {r.params["op"] for r in numbers["kernel_time"]} == set(Ops._fields)
    for metric in ("layer_time", "step_estimate"):
        assert [r.params["mode"] for r in numbers[metric]] == ["full", "window", "freekv"]
    assert numbers["step_estimate"][-1].params.keys() >= {"flagged", "recalled_mb", "hit_share", "moves"}
    for metric in ("rate_beside_decode", "decode_beside_transfer"):
        assert [r.params["way"] for r in numbers[metric]] == WAYS
    assert {r.params["direction"] for r in numbers["link_copy"]} == {"to the GPU", "from the GPU"}


def test_stage_0_checks_claims_host_order_ops_and_replayed_steps(rehearsal):
    checks = [r for r in read_records(rehearsal[1] / "gpu_suite.jsonl") if r.metric == "check"]
    assert all(check.value == 1 for check in checks)
    names = "; ".join(check.params["name"] for check in checks)
    assert "claims of 100 blocks keep their contract" in names
    assert "what recall and encode read back is what append wrote" in names
    assert "audit of replayed steps" in names and "racecheck" in names and "memcheck" in names
    assert "recall_blocks copies what the host has" in names
    for op in ("append_tokens", "score_pages", "share_pages", "correct_windows", "select_pages", "encode_pages"):
        assert f"{op}, " in names


def test_the_report_of_a_stage_has_its_goals_and_not_those_of_others(rehearsal):
    report = (rehearsal[1] / "report.md").read_text()
    assert "estimated step: full attention / FreeKV, 128K, batch 1 | at least 1.6" in report
    assert "memory not capped" not in report


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


def test_the_command_for_a_machine_without_network_brings_its_files_back(tmp_path: Path):
    _, section = (ROOT / "benchmarks/gpu/README.md").read_text().split("## Stage 0 on a machine without network")
    command = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    assert len(command) <= 2000 and command.count("stage0") == 1
    out = tmp_path / "out"
    out.mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path), "OUT": str(out), "OMP_NUM_THREADS": "1"}
    one_phase = command.replace("stage0", "env --rehearse").replace("python3", sys.executable)
    done = subprocess.run(["bash", "-c", one_phase], cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in out.iterdir()} == {"gpu_suite.jsonl", "machine.json", "logs.tar.gz"}
    assert {record.commit for record in read_records(out / "gpu_suite.jsonl")} == {"unknown"}


def test_a_stage_is_a_command_for_its_phases_within_its_minutes():
    stage = parse_args(["stage0", "--out", "d"])
    assert (stage.phase, stage.out, stage.minutes) == (None, Path("d"), 4)
    assert stage.phases == [phase.name for phase in PHASES if phase.stage == 0]
    least = sum(phase.least for phase in PHASES if phase.stage == 0 and not phase.is_background)
    assert least < 60 * stage.minutes / 2, "a phase that takes long must not cost the ones behind it"


def test_nothing_is_timed_beside_what_runs_in_the_background():
    running = set()
    for phase in [phase for phase in PHASES if phase.stage == 0]:
        running -= set(phase.needs)
        if phase.is_background:
            running.add(phase.name)
        elif phase.name in ("layer", "kernels", "link"):
            assert not running


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


def test_steps_whose_queries_move_and_stand_still_are_two_numbers_beside_what_was_predicted_of_each(tmp_path: Path):
    writer = RecordWriter("gpu_suite", tmp_path / "gpu_suite.jsonl")
    cell = {"mode": "freekv", "batch": 8, "context": 32768}
    for moves, predicted, measured in ((0.11, 8.0, 10.0), (0.0, 6.0, 6.6)):
        writer.write("predicted_step", predicted, "ms", {**cell, "moves": moves})
        writer.write("step_estimate", measured, "ms", {**cell, "moves": moves, "flagged": 0.2})
        writer.write("explained_step", predicted + 1, "ms", {**cell, "moves": moves})
    lines = predictions_table(Numbers(read_records(writer.path))).lines[1:]
    assert [line[2:] for line in lines] == [["8 ms", "10", "1.25", "9"], ["6 ms", "6.6", "1.1", "7"]]


def test_everything_that_stage_0_predicts_is_measured_under_the_same_name(rehearsal):
    records = read_records(rehearsal[1] / "gpu_suite.jsonl")
    lines = predictions_table(Numbers(records)).lines[1:]
    assert len(lines) == 6 and [line for line in lines if line[3] == ""] == [lines[3]]  # nobody stands still
    first = next(i for i, r in enumerate(records) if r.metric == "step_estimate")
    assert max(i for i, r in enumerate(records) if r.metric == "predicted_step") < first
