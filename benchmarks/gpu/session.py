"""What every phase gets: where to write, how much time is left, and whether this is a rehearsal on a CPU."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu.shapes import SHAPES, ModelShape
from benchmarks.records import RecordWriter
from sglang_freekv.config import FreeKVConfig


@dataclass
class Session:
    """One phase of one run.

    A rehearsal executes the same lines on a CPU, with tiny sizes; what it records is marked, and means nothing.
    """

    phase: str
    out: Path
    seconds: float  # soft limit: what has not begun by then is left out
    shape_name: str = "llama-8b"
    is_rehearsal: bool = False
    writer: RecordWriter = field(init=False)

    def __post_init__(self) -> None:
        self._start = time.monotonic()
        if self.is_rehearsal:
            self.shape_name = "rehearsal"
        # Each record says how to get it again: by the suite, not by this process.
        flags = ["--rehearse"] if self.is_rehearsal else ["--model-shape", self.shape_name]
        sys.argv[1:] = ["--out", "DIR", "--only", self.phase, *flags]
        self.writer = RecordWriter("gpu_suite", self.records, module="benchmarks.gpu")
        if self.machine.exists():
            self.writer.environment |= json.loads(self.machine.read_text())
        if self.is_rehearsal:
            self.writer.environment |= {"rehearsal": True}

    @property
    def records(self) -> Path:
        return self.out / "gpu_suite.jsonl"

    @property
    def machine(self) -> Path:
        """What the phase `env` found, to stand in every record."""
        return self.out / "machine.json"

    @property
    def device(self) -> str:
        return "cpu" if self.is_rehearsal else "cuda"

    @property
    def shape(self) -> ModelShape:
        return SHAPES[self.shape_name]

    @property
    def config(self) -> FreeKVConfig:
        """Settings of the engine where a phase does not choose them."""
        if not self.is_rehearsal:
            return FreeKVConfig()
        return FreeKVConfig(budget_tokens=192, sink_tokens=32, recent_tokens=32, arena_tokens=256)

    @property
    def left(self) -> float:
        """Seconds until the soft limit."""
        return self._start + self.seconds - time.monotonic()

    def has_time(self, seconds: float, what: str) -> bool:
        """Whether something that takes about `seconds` may begin; says so where it may not."""
        if self.left >= seconds:
            return True
        self.say(f"SKIPPED for lack of time: {what} (about {seconds:.0f} s, {self.left:.0f} s left)")
        return False

    def say(self, text: str) -> None:
        """A line of the phase's log, with the time since the phase began."""
        print(f"[{time.monotonic() - self._start:6.1f} s] {text}", flush=True)

    def record(self, metric: str, value: float, unit: str, shown: bool = True, **params: int | float | str) -> None:
        """Append a measurement, and print it."""
        self.writer.write(metric, value, unit, params)
        if shown:
            described = " ".join(f"{name}={value}" for name, value in params.items())
            self.say(f"{metric} {value:.6g} {unit}  {described}")

    def check(self, name: str, holds: bool, detail: str = "") -> None:
        """Record a property that must hold.

        Raises
        ------
        AssertionError
            If it does not, after it is recorded.
        """
        self.record("check", int(holds), "passed", name=name, detail=detail)
        if not holds:
            raise AssertionError(f"{name}: {detail}")


class Failures:
    """One cell that fails does not take the others with it, but the phase has failed."""

    def __init__(self, session: Session) -> None:
        self.session, self.first = session, None

    @contextlib.contextmanager
    def kept(self, what: str) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.session.say(f"DOES NOT FIT: {what}: {str(error).splitlines()[0]}")
        except Exception as error:
            self.session.say(f"FAILED: {what}\n{traceback.format_exc()}")
            self.first = self.first or error

    def raise_first(self) -> None:
        if self.first is not None:
            raise self.first
