"""What the processes of a run share: the model, the texts, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.methods import Method

TAIL = 64  # tokens of a prompt that each method reads itself, whole pages
PAGE = 64  # tokens; the largest page size, so a multiple of all


class Cell(NamedTuple):
    """A method behind a context with a budget, in tokens."""

    method: Method
    context: int
    budget: int


class Work(NamedTuple):
    """Tokens that were processed, of all texts."""

    prefilled: int = 0
    decoded: int = 0


@dataclass(frozen=True)
class Job:
    """One run."""

    model: str
    dtype: str
    device: str
    texts: tuple[tuple[int, ...], ...]
    contexts: tuple[int, ...]
    num_steps: int
    every: int  # steps of which one looks at exact attention
    windows: float  # of device blocks per request
    folder: Path  # of the log-probabilities of full attention

    @property
    def num_tokens(self) -> int:
        """Of a text: the longest context, and what is decoded behind it."""
        return max(self.contexts) + self.num_steps + 1

    @property
    def num_slots(self) -> int:
        """Token slots that the texts take, and the pool's first page, which is padding."""
        own = whole_pages(self.num_tokens) + whole_pages(TAIL + self.num_steps)
        return len(self.texts) * own + PAGE

    def log_probabilities(self, context: int) -> Path:
        """Of full attention behind a context: float32 ``[num_steps, num_texts, vocabulary]``."""
        return self.folder / f"full-{context}.npy"


def whole_pages(tokens: int) -> int:
    """The tokens of the pages that hold so many."""
    return -(-tokens // PAGE) * PAGE
