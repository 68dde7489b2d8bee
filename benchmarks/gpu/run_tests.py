"""Phases kernel-tests and gpu-tests: the repository's own tests, where they run on the GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

from benchmarks.gpu.session import Session
from benchmarks.records import ROOT

_PROCESSES = 8  # each has a context of some 500 MB on the GPU


def test_kernels(session: Session) -> None:
    """Every op against its reference; without a GPU, in Triton's interpreter."""
    if session.is_rehearsal:
        run_pytest(session, ["tests/kernels/test_list_pages.py"])
    else:
        # What compiles for GPUs that are not here is known without one.
        run_pytest(session, ["tests/kernels", "--ignore=tests/kernels/test_compile.py"])


def test_gpu(session: Session) -> None:
    """Everything that is marked as needing a GPU; a rehearsal has other tests."""
    if session.is_rehearsal:
        run_pytest(session, ["tests/benchmarks/test_records.py", "-m", "not gpu"])
    else:
        run_pytest(session, ["tests", "-m", "gpu"])


def run_pytest(session: Session, arguments: list[str]) -> None:
    """Run pytest and record how many tests passed and failed.

    Raises
    ------
    AssertionError
        If a test failed, none passed, or the time is over.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider", *arguments]
    if importlib.util.find_spec("xdist") and not session.is_rehearsal:
        command += ["-n", str(_PROCESSES), "--dist", "loadfile"]
    session.say(" ".join(command[1:]))
    path = session.out / "logs" / f"{session.phase}-pytest.log"
    with path.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(max(session.left, 1))
        except subprocess.TimeoutExpired:
            process.kill()
            file.write("\nended: the time of this phase is over\n")
    output = path.read_text()
    print(output, flush=True)
    counts = {
        kind: sum(map(int, re.findall(rf"(\d+) {kind}", output[-600:]))) for kind in ("passed", "failed", "error")
    }
    for kind, count in counts.items():
        session.record(f"tests_{kind}", count, "tests")
    last_line = output.strip().splitlines()[-1]
    session.check("tests", process.returncode == 0 and counts["passed"] > 0, last_line)
