"""Benchmark records: one JSON line per number, with everything that is needed to judge it and to measure it again."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

_MORE_IS_BETTER = {"tokens/s", "GB/s", "requests/s", "requests"}
_LESS_IS_BETTER = {"s", "ms", "bytes"}


@dataclass(frozen=True)
class Record:
    """One measured number. Everything needed to judge it and to measure it again."""

    name: str  # the benchmark; also the stem of its file
    params: dict[str, int | float | str]
    metric: str
    value: float
    unit: str
    baseline: str | None  # what the value is compared with, None where nothing is
    baseline_value: float | None  # in the same unit
    ratio: float | None  # value / baseline_value, unless the benchmark pairs its measurements
    commit: str  # with "-dirty" where the working tree differs from it
    environment: dict[str, int | float | str | None]
    command: str
    time: str  # UTC, ISO 8601


@dataclass
class RecordWriter:
    """Appends records of one run to a file. Commit and environment are read once, when the run starts."""

    name: str
    path: Path
    commit: str = field(default_factory=lambda: describe_commit())
    environment: dict = field(default_factory=lambda: describe_environment())
    module: str = ""  # that was run, where it is not the one in `benchmarks` of that name

    def write(
        self,
        metric: str,
        value: float,
        unit: str,
        params: dict[str, int | float | str],
        *,
        baseline: str | None = None,
        baseline_value: float | None = None,
        ratio: float | None = None,
    ) -> Record:
        """Append one record; the ratio is computed where it is not given.

        Raises
        ------
        ValueError
            If only one of `baseline` and `baseline_value` is given.
        """
        if (baseline is None) != (baseline_value is None):
            raise ValueError(f"baseline and its value belong together, got {baseline!r} and {baseline_value!r}")
        if ratio is None and baseline_value:
            ratio = value / baseline_value
        record = Record(
            name=self.name,
            params=params,
            metric=metric,
            value=value,
            unit=unit,
            baseline=baseline,
            baseline_value=baseline_value,
            ratio=ratio,
            commit=self.commit,
            environment=self.environment,
            command=shlex.join(["python", "-m", self.module or f"benchmarks.{self.name}", *sys.argv[1:]]),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        return record


def read_records(path: Path) -> list[Record]:
    """Read a file of records.

    Raises
    ------
    ValueError
        If a line does not have exactly the fields of a record.
    """
    names = {f.name for f in fields(Record)}
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        values = json.loads(line)
        if set(values) != names:
            wrong = ", ".join(sorted(set(values) ^ names))
            raise ValueError(f"{path}:{number}: missing or unknown fields: {wrong}; write it with RecordWriter")
        records.append(Record(**values))
    return records


def describe_commit() -> str:
    """The commit of the working tree, "-dirty" appended where it differs; results do not count.

    `FREEKV_COMMIT` says it where the tree was copied to without its repository.
    """
    if told := os.environ.get("FREEKV_COMMIT"):
        return told
    commit = _git("rev-parse", "--short=12", "HEAD") or "uncommitted"
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/README.md")
    return f"{commit}-dirty" if changes else commit


def _git(*args: str) -> str:
    """What git prints; empty where there is no repository, no commit yet, or no git."""
    if shutil.which("git") is None:
        return ""
    result = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def describe_environment() -> dict[str, int | float | str | None]:
    """The machine and the versions that a number depends on."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "sglang", "sglang-freekv")},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def verdict(record: Record) -> str:
    """ "win" or "**loss**" against the baseline; empty where the unit does not say which it is."""
    if record.ratio in (None, 1) or record.unit not in _MORE_IS_BETTER | _LESS_IS_BETTER:
        return ""
    return "win" if (record.ratio > 1) == (record.unit in _MORE_IS_BETTER) else "**loss**"
