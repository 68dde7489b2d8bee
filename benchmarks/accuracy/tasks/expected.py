"""Scores: what a turn should answer, and which of its items an output has. All on token ids, 0 or 1 per item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.accuracy.tasks.session import Outputs
from benchmarks.needle import language as lang

Item = tuple[int, ...]


def records(tokens: Sequence[int]) -> list[Item]:
    """The records of an answer, each a key and its value: what lies between ends and pointers."""
    found: list[list[int]] = [[]]
    for token in tokens:
        if token in (lang.END, lang.POINTER):
            found.append([])
        else:
            found[-1].append(token)
    return [tuple(record) for record in found if record]


def words(tokens: Sequence[int]) -> list[Item]:
    """Every word by itself."""
    return [(token,) for token in tokens if token not in (lang.END, lang.POINTER)]


def steps(tokens: Sequence[int]) -> list[Item]:
    """Every word with the word before it.

    A word counts where it follows the word that it should follow: of two random orders of a few hundred words, the
    longest common subsequence has 10 % and more, of their steps next to nothing.
    """
    plain = [word for (word,) in words(tokens)]
    return list(pairwise(plain))


def passage_steps(tokens: Sequence[int]) -> list[Item]:
    """The steps after a key of two words: one for each word of its value."""
    return steps(tokens)[1:]


@dataclass(frozen=True)
class Expected:
    """The score of a turn with one right answer.

    A reference is an item of `answer`. It counts if the output has it; with `in_order` it counts if it lies on a
    longest common subsequence of both, so that one slip does not void what comes after it.
    """

    answer: list[int]  # tokens, the end included
    items: Callable[[Sequence[int]], list[Item]]
    in_order: bool = False
    turn: int = 0

    def __call__(self, outputs: Outputs) -> list[float]:
        wanted, given = self.items(self.answer), self.items(outputs[self.turn])
        if self.in_order:
            return _in_order(wanted, given)
        return [float(item in given) for item in wanted]


@dataclass(frozen=True)
class Quoted:
    """The score of a turn that is asked for what the model invented in an earlier one: its value, exactly and whole.

    An invention that does not repeat its key or is empty counts as 0: there is nothing to quote.
    """

    key: Item
    invented: int  # turn
    turn: int

    def __call__(self, outputs: Outputs) -> list[float]:
        fact, *_ = records(outputs[self.invented]) or [()]
        is_fact = fact[: len(self.key)] == self.key and len(fact) > len(self.key)
        return [float(is_fact and records(outputs[self.turn])[:1] == [fact])]


def _in_order(wanted: list[Item], given: list[Item]) -> list[float]:
    """1 for each item of `wanted` on a longest common subsequence, else 0."""
    best = [[0] * (len(given) + 1) for _ in range(len(wanted) + 1)]  # of the rests from i and j on
    for i in reversed(range(len(wanted))):
        for j in reversed(range(len(given))):
            same = wanted[i] == given[j]
            best[i][j] = best[i + 1][j + 1] + 1 if same else max(best[i + 1][j], best[i][j + 1])
    kept, j = [], 0
    for i, item in enumerate(wanted):
        if j < len(given) and best[i][j] == best[i + 1][j]:
            kept.append(0.0)
            continue
        while j < len(given) and item != given[j]:
            j += 1
        kept.append(float(j < len(given)))
        j += 1
    return kept
