"""What a task hands to a runner: sessions of turns, each with its prompt and its score, all in tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

Outputs = list[list[int]]  # tokens generated so far in the session, one list per turn


class Turn(NamedTuple):
    """One request. Its prompt is all tokens of the session so far, outputs included, then `prompt`."""

    prompt: list[int]  # tokens appended to the session before generating; turn 0 holds the document
    max_new_tokens: int
    score: Callable[[Outputs], list[float]] | None  # one value in 0..1 per reference (answer, item); None: not scored
    ignore_eos: bool = False
    temperature: float = 0.0  # above 0 only where the model invents; seeded by the runner


class Session(NamedTuple):
    """Turns over one document."""

    turns: tuple[Turn, ...]  # multi-turn: the next prompt is all tokens so far + turn.prompt
    context: int  # tokens of prompt and answer together at most, exact by construction for single-turn tasks


class Task(Protocol):
    """A family of sessions; a seed determines them."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> str:
        """lookup, walk, copy, aggregate, session or generation."""
        ...

    def sessions(self, seed: int, count: int, context: int) -> list[Session]:
        """`count` sessions of `context` tokens."""
        ...
