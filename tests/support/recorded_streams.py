"""CUDA's streams and events on a CPU: what is launched is done at once, and what it would have waited for is noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch

from freekv_kernels import Ops
from sglang_freekv.algorithm import engine as engine_module
from sglang_freekv.algorithm.stream import SideStreams
from tests.support.simulated_requests import SimulatedEngine

# Whatever reads or writes block tables, blocks and lists of misses.
TABLE_OPS = ("lookup_blocks", "claim_blocks", "recall_blocks", "fetch_blocks")


class Launch(NamedTuple):
    """One op."""

    number: int
    name: str
    layer: int | None
    stream: RecordedStream
    past: frozenset[int]  # numbers of the launches that it waits for, directly or not

    def follows(self, other: Launch) -> bool:
        return other.number in self.past

    @property
    def follows_everything(self) -> bool:
        return len(self.past) == self.number


class RecordedStream:
    """Stands for a CUDA stream, and, where it holds what a stream was given so far, for an event.

    As CUDA does, it refuses that a stream in a graph waits for one that is not in it.
    """

    def __init__(self, *_, past: set[int] = frozenset(), is_captured: bool = False) -> None:
        self.past, self.is_captured = set(past), is_captured

    def wait_event(self, event: RecordedStream) -> None:
        if self.is_captured and not event.is_captured:
            raise RuntimeError("a graph waits for a stream that is not in it")
        self.past |= event.past
        self.is_captured |= event.is_captured

    wait_stream = wait_event

    def record_event(self) -> RecordedStream:
        return RecordedStream(past=self.past, is_captured=self.is_captured)


class RecordedStreams:
    """In place of `torch.cuda`'s streams, and of an engine's ops and attention.

    Attributes
    ----------
    main : RecordedStream
        The current stream outside of forks.
    launches : list of Launch
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main, self.launches, self._made = RecordedStream(), [], []
        self._current, self._layer, self._failing = [self.main], None, ()
        monkeypatch.setattr(torch.cuda, "Stream", self._make)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self._current[-1])
        monkeypatch.setattr(torch.cuda, "stream", self._switch)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        monkeypatch.setattr(engine_module, "SideStreams", lambda _: SideStreams("cuda"))

    def _make(self, *_) -> RecordedStream:
        self._made.append(RecordedStream())
        return self._made[-1]

    @contextmanager
    def _switch(self, stream: RecordedStream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def launch(self, name: str) -> Launch:
        """An op, or something else, is launched on the current stream."""
        if name in self._failing:
            raise RuntimeError(f"planted in {name}")
        stream = self._current[-1]
        launch = Launch(len(self.launches), name, self._layer, stream, frozenset(stream.past))
        stream.past.add(launch.number)
        self.launches.append(launch)
        return launch

    def watch(self, engine: SimulatedEngine) -> None:
        """Note the ops and the attention of an engine, which runs as on a GPU: nothing is spared."""
        memory = engine.memory
        memory.runs_references = False
        memory.ops = Ops(*(self._noted(name, op) for name, op in memory.ops._asdict().items()))
        for attention in engine.decoder.attentions.values():
            attention.run = self._noted("attend", attention.run)
        for phase in (engine.decoder, engine.prefiller):
            phase.run = self._in_layer(phase.run)

    def _noted(self, name: str, call: Callable) -> Callable:
        def noted(*args, **kwargs):
            self.launch(name)
            return call(*args, **kwargs)

        return noted

    def _in_layer(self, run: Callable) -> Callable:
        def run_layer(number: int, *args) -> torch.Tensor:
            self._layer = number
            try:
                return run(number, *args)
            finally:
                self._layer = None

        return run_layer

    @contextmanager
    def failing_at(self, *names: str) -> Iterator[None]:
        """The launch of one of these ops raises."""
        self._failing = names
        try:
            yield
        finally:
            self._failing = ()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Refuse, as CUDA does, a graph that ends before its forks are joined."""
        self.main.is_captured = True
        yield
        is_joined = all(stream.past <= self.main.past for stream in self._made if stream.is_captured)
        for stream in (self.main, *self._made):
            stream.is_captured = False
        if not is_joined:
            raise RuntimeError("a graph ends with unjoined work")
