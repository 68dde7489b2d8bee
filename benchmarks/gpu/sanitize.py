"""Phase sanitize: races in shared memory, and accesses beyond tensors, as compute-sanitizer sees them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.session import Session
from benchmarks.records import ROOT

_KERNELS = r"regex=^_[a-z0-9_]+_kernel$"  # those of this repository; torch's have mangled names
_FAULTS = 9  # exit status
_TESTS = {
    # Kernels whose programs hand something on within themselves: histograms, scans, decoded tiles.
    "racecheck": (
        "test_select_pages.py::test_the_step_that_reads_decides_how_many_pages_there_are",
        "test_claim_blocks.py::test_a_pair_that_is_listed_several_times_gets_one_block_at_one_entry",
        "test_score_pages.py::test_the_step_that_reads_decides_whether_a_request_is_over_its_budget",
        "test_share_pages.py::test_listed_pages_share_the_attention_among_themselves",
        "test_correct_windows.py::test_corrected_rows_have_the_window_that_select_pages_writes",
        "test_correct_windows.py::test_rows_that_are_not_due_keep_their_windows_and_the_others_are_as_in_every_step",
    ),
    # Kernels whose addresses come from lists and tables.
    "memcheck": (
        "test_recall_blocks.py::test_entries_without_a_block_to_fill_are_not_copied",
        "test_append_tokens.py::test_tokens_appended_one_by_one_leave_the_page_and_its_bounds",
        "test_append_tokens.py::test_rows_are_due_where_no_steps_are_left_or_a_page_opens_and_others_wait_a_step_less",
        "test_lookup_blocks.py::test_the_kernel_and_the_reference_agree_on_random_windows",
        "test_fetch_blocks.py::test_free_blocks_go_first_and_victims_serve_the_rest",
        "test_claim_blocks.py::test_where_free_blocks_run_out_victims_serve_the_rest",
        "test_score_pages.py::test_a_wider_output_is_written_up_to_the_pages_of_the_table",
    ),
}


def run(session: Session) -> None:
    program = shutil.which("compute-sanitizer")
    session.record("sanitizer", int(program is not None), "present")
    if program is None and not session.is_rehearsal:
        session.say("SKIPPED: no compute-sanitizer on PATH")
        return
    logs = {tool: session.out / "logs" / f"{session.phase}-{tool}.log" for tool in _TESTS}
    processes = {tool: _start(session, program, tool, log) for tool, log in logs.items()}  # side by side
    failed = []
    for tool, process in processes.items():
        try:
            process.wait(max(session.left, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool's program with it
            process.wait()
        lines = logs[tool].read_text().strip().splitlines() or ["it printed nothing"]
        print("\n".join(lines[-30:]), flush=True)
        holds = process.returncode == 0
        detail = lines[-1] if holds else f"exit status {process.returncode} ({_FAULTS}: faults found): {lines[-1]}"
        session.record("check", int(holds), "passed", name=f"{tool} of small tests", detail=detail)
        failed += [] if holds else [f"{tool}: {detail}"]
    if failed:
        raise AssertionError("; ".join(failed))


def _start(session: Session, program: str | None, tool: str, log: Path) -> subprocess.Popen:
    """A rehearsal only asks pytest whether there are such tests."""
    tests = [f"tests/kernels/{test}" for test in _TESTS[tool]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", *tests]
    if session.is_rehearsal:
        command.append("--collect-only")
    else:
        options = ["--error-exitcode", str(_FAULTS), "--report-api-errors", "no", "--kernel-name", _KERNELS]
        options += ["--target-processes", "application-only"]  # compilers are processes, too
        command = [program, "--tool", tool, *options, *command]
    session.say(" ".join(command))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
