"""Runs the phases one after the other, each a process with a time limit and a log of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from benchmarks.gpu.phases import Phase
from benchmarks.gpu.toolchain import compiler_environment
from benchmarks.records import ROOT
from sglang_freekv import __version__

_GRACE_S = 15  # between the limit that a phase keeps itself, and its end
_REPORT_S = 5
_PROGRESS_S = 20
_PATHS = (ROOT, ROOT / "kernels", ROOT / "patches")


@dataclass
class Job:
    """A phase that runs."""

    phase: Phase
    process: subprocess.Popen
    log: Path
    start: float
    seconds: float

    def end(self) -> int:
        """Wait for the limit and a little longer, then kill it and all that it has started; the exit status."""
        deadline = self.start + self.seconds + _GRACE_S
        said = time.monotonic()
        try:
            while self.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
                if time.monotonic() - said > _PROGRESS_S:
                    said = time.monotonic()
                    print(f"          {self.phase.name}: {self.last_line()}", flush=True)
        finally:
            self.kill()
        return self.process.wait()

    def kill(self) -> None:
        """End what still runs of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # started in a group of its own

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][-140:] if lines else "nothing in its log yet"


class Suite:
    """Runs phases one after the other, within a budget of time.

    Parameters
    ----------
    out : Path
        A folder; kept from run to run, so that later runs add to it.
    flags : list of str
        Passed on to every phase.
    budget : float, s
    """

    def __init__(self, out: Path, flags: list[str], budget: float) -> None:
        self.out, self.flags, self.budget = out, flags, budget
        self.start = time.monotonic()
        self.background: dict[str, Job] = {}
        self.results: dict[str, str] = {}  # phase -> passed, or what went wrong
        (out / "logs").mkdir(parents=True, exist_ok=True)
        is_rehearsal = "--rehearse" in flags
        self.environment = phase_environment(out, is_rehearsal)
        self.patience = 4 if is_rehearsal else 1  # two busy cores in place of a GPU host

    @property
    def left(self) -> float:
        return self.start + self.budget - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    def run(self, phases: list[Phase]) -> None:
        try:
            for index, phase in enumerate(phases):
                reserved = sum(p.least for p in phases[index + 1 :] if not p.is_background)
                self._run_phase(phase, reserved + _REPORT_S)
            for name in list(self.background):
                self._finish(self.background.pop(name))
        finally:
            for job in self.background.values():
                job.kill()

    def _run_phase(self, phase: Phase, reserved: float) -> None:
        for name in phase.needs:
            if name in self.background:
                self.say(f"{phase.name} waits for {name}")
                self._finish(self.background.pop(name))
        seconds = min(phase.seconds * self.patience, self.left - reserved - _GRACE_S)
        if seconds < phase.least:
            # What later phases need at least is theirs only as long as this one gets its own minimum, too.
            seconds = min(phase.least, self.left - _REPORT_S - _GRACE_S)
        if seconds < phase.least:
            self.results[phase.name] = f"skipped, {max(self.left, 0):.0f} s of the budget are left"
            self.say(f"{phase.name}: {self.results[phase.name]}")
            return
        job = self._start(phase, seconds)
        if phase.is_background:
            self.background[phase.name] = job
        else:
            self._finish(job)

    def _start(self, phase: Phase, seconds: float) -> Job:
        log = self.out / "logs" / f"{phase.name}.log"
        command = [sys.executable, "-m", "benchmarks.gpu", phase.name, "--out", str(self.out)]
        command += ["--seconds", str(int(seconds)), *self.flags]
        self.say(f"{phase.name} starts, up to {seconds:.0f} s{', in the background' * phase.is_background}: {log}")
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        return Job(phase, process, log, time.monotonic(), seconds)

    def _finish(self, job: Job) -> None:
        status = job.end()
        seconds = time.monotonic() - job.start
        if status == 0:
            result = "passed"
        elif status < 0:
            result = f"FAILED, killed after {seconds:.0f} s (limit {job.seconds:.0f} s)"
        else:
            result = f"FAILED with exit status {status}"
        self.results[job.phase.name] = result
        self.say(f"{job.phase.name}: {result}, {seconds:.0f} s")
        if status:
            tail = job.log.read_text(errors="replace").splitlines()[-12:]
            print("\n".join(f"          | {line[:160]}" for line in tail), flush=True)


def phase_environment(out: Path, is_rehearsal: bool) -> dict[str, str]:
    """The environment of the phases: this source tree with its plug-ins, and compiler caches below `out`."""
    environment, caches = dict(os.environ), (out / "caches").resolve()
    paths = [str(path) for path in _PATHS]
    if not any(e.value.startswith("sglang_freekv") for e in entry_points(group="sglang.srt.plugins")):
        paths.append(str(write_entry_points(caches / "plugin")))
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [environment.get("PYTHONPATH")])])
    environment["PYTHONUNBUFFERED"] = "1"
    for name, folder in {
        "FLASHINFER_WORKSPACE_BASE": "flashinfer",
        "TVM_FFI_CACHE_DIR": "tvm-ffi",
        "TRITON_CACHE_DIR": "triton",
        "TORCH_EXTENSIONS_DIR": "torch-extensions",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
    }.items():
        environment.setdefault(name, str(caches / folder))
    environment |= compiler_environment(caches, environment)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.setdefault(name, "1")  # nothing is looked up, so nothing waits for a network
    if is_rehearsal:
        environment |= {"OMP_NUM_THREADS": "1", "FLASHINFER_CUDA_ARCH_LIST": "9.0a", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def write_entry_points(folder: Path) -> Path:
    """Tell SGLang of this package where it is not installed: the entry points of pyproject.toml, as installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{__version__}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {__version__}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder
