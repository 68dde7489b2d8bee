"""Phases kernel-tests, gpu-tests and attention-tests: the repository's own tests, where they run on the GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile

from benchmarks.gpu.session import Session
from benchmarks.records import ROOT

_PROCESSES = 12  # each has a context of some 500 MB on the GPU
_KINDS = ("passed", "failed", "error", "skipped")
# Tests of attention whose kernels `compile_serving` has compiled: bfloat16, heads of 128 elements.
_SERVED = "((bf16 or graph_captured) and not 64 and not 256)"
_ENDED = "ended: the time of this phase is over"


def test_kernels(session: Session) -> None:
    """Every op against its reference; without a GPU, in Triton's interpreter."""
    if session.is_rehearsal:
        run_pytest(session, ["tests/kernels/test_forget_blocks.py"])
    else:
        # What compiles for GPUs that are not here, and what the references do, is known without one.
        run_pytest(
            session, ["tests/kernels", "--ignore=tests/kernels/test_compile.py", "-k", "triton or not reference"]
        )


def test_gpu(session: Session) -> None:
    """The engine, and attention in the shape that is served, where they need a GPU; a rehearsal has other tests."""
    if session.is_rehearsal:
        run_pytest(session, ["tests/kernels/test_write_tables.py", "-m", "not gpu"])
    else:
        files = ["tests/attention", "tests/algorithm/test_engine_on_kernels.py"]
        run_pytest(session, [*files, "-m", "gpu", "-k", f"test_engine_on_kernels or {_SERVED}"])


def test_attention(session: Session) -> None:
    """Attention in all other shapes; a rehearsal has other tests."""
    if session.is_rehearsal:
        run_pytest(session, ["tests/kernels/test_write_tables.py", "-m", "not gpu"])
    else:
        run_pytest(session, ["tests/attention", "-m", "gpu", "-k", f"not {_SERVED}"])


def run_pytest(session: Session, arguments: list[str]) -> None:
    """Share tests among several processes, and record how many passed and failed.

    Raises
    ------
    AssertionError
        If a test failed, none passed, or the time is over.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider"]
    num_processes = 2 if session.is_rehearsal else min(_PROCESSES, len(os.sched_getaffinity(0)))
    logs = [session.out / "logs" / f"{session.phase}-pytest-{number}.log" for number in range(num_processes)]
    with tempfile.TemporaryDirectory() as folder:
        command += ["-p", "benchmarks.gpu.shared_tests", "--share-tests", folder, *arguments]
        session.say(f"{num_processes} times {' '.join(command[1:])}")
        processes = []
        for log in logs:
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT))
        for process, log in zip(processes, logs, strict=True):
            try:
                process.wait(max(session.left, 1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                log.write_text(f"{log.read_text()}\n{_ENDED}\n")
    _record_outcome(session, [process.returncode for process in processes], [log.read_text() for log in logs])


def _record_outcome(session: Session, statuses: list[int], outputs: list[str]) -> None:
    counts = {kind: sum(_count(kind, output) for output in outputs) for kind in _KINDS}
    for status, output in zip(statuses, outputs, strict=True):
        if status:
            print(output, flush=True)
    for kind, count in counts.items():
        session.record(f"tests_{kind}", count, "tests")
    last_lines = "; ".join(output.strip().splitlines()[-1] for output in outputs)
    session.check("tests", not any(statuses) and counts["passed"] > 0, last_lines)


def _count(kind: str, output: str) -> int:
    """Of pytest's last line; where that is missing, as the time was over, of the marks of the tests that ran."""
    if _ENDED in output:
        mark = {"passed": ".", "failed": "F", "error": "E", "skipped": "s"}[kind]
        return sum(line.count(mark) for line in re.findall(r"^([.FEsx]+)(?:\s+\[.*)?$", output, re.MULTILINE))
    return sum(map(int, re.findall(rf"(\d+) {kind}", output[-600:])))
