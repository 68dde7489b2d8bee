"""The servers that are compared: plain SGLang, and each method with the budget of a context on a tight device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.methods import METHODS, Method
from benchmarks.server import Server
from benchmarks.throughput.setups import Common, Retrieval

CONCURRENCY = 4  # requests at once
TOKENS = 40960  # of all requests and of the prefix cache
_CHUNK = 8192  # tokens of prompts that are read at once, without a GPU


class Side(NamedTuple):
    """One side of a comparison."""

    method: Method
    budget: int | None  # tokens; None for full attention

    @property
    def name(self) -> str:
        return self.method.name if self.budget is None else f"{self.method.name}-{self.budget}"

    @property
    def params(self) -> dict[str, str | int]:
        """What tells it from other sides in records."""
        return {"method": self.method.name} | ({} if self.budget is None else {"budget": self.budget})


PLAIN = Side(METHODS["full"], None)


@dataclass
class Servers:
    """Servers of one model. Those that are shared start when they are first asked for, and freeze between uses.

    Parameters
    ----------
    logs : Path
        Folder of their messages.
    flags : tuple of str
        The user's, for every server; they win.
    """

    model: Path
    logs: Path
    flags: tuple[str, ...] = ()
    _stack: ExitStack = field(default_factory=ExitStack)
    _shared: dict[Side, Server] = field(default_factory=dict)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def use(self, side: Side) -> Iterator[Server]:
        """The shared server of a side, with an empty prefix cache; no other runs meanwhile."""
        if side not in self._shared:
            self._shared[side] = self._stack.enter_context(self.start(side, side.name))
            self._shared[side].freeze()
        with self._shared[side].thawed():
            self._shared[side].flush_cache()
            yield self._shared[side]

    @contextmanager
    def start(
        self,
        side: Side,
        name: str,
        *flags: str,
        model: Path | None = None,
        tokens: int = TOKENS,
        requests: int = CONCURRENCY,
        env: dict[str, str] | None = None,
    ) -> Iterator[Server]:
        """A server for this once, with more flags, another model, other sizes or more variables."""
        flags = self.flags_of(side, model or self.model, tokens, requests, flags)
        with _variables(env or {}):
            server = Server(side.name, flags, self.logs / f"{name}.log")
        try:
            yield server
        finally:
            server.stop()

    def flags_of(self, side: Side, model: Path, tokens: int, requests: int, more: tuple[str, ...]) -> list[str]:
        """All flags; the device holds two windows of the budget for each request, which is what the engine needs."""
        flags = ("--enable-cache-report", *more, *self.flags)
        common = Common(model, "auto", tokens, requests, _CHUNK, server_flags=flags)
        if side.budget is None:
            return list(common.plain().flags)
        return list(Retrieval(side.budget, flags=side.method.flags).setup(side.name, common).flags)


@contextmanager
def _variables(wanted: dict[str, str]) -> Iterator[None]:
    """Variables of what this process starts."""
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
