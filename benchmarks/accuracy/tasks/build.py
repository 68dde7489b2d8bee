"""What tasks are built of: sessions from seeds, documents of an exact length, and chains to ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count as count_up
from random import Random

from benchmarks.accuracy.tasks.expected import Expected, records
from benchmarks.accuracy.tasks.session import Session, Turn
from benchmarks.needle import documents as doc

MIN_CONTEXT = 512  # tokens
DISTRACTORS = 0.3  # of a document's tokens, where a task has others than the records it asks for

Key = tuple[int, ...]
DrawKeys = Callable[[Random, int], Sequence[Key]]
DrawValue = Callable[[Random], tuple[int, ...]]


@dataclass(frozen=True)
class GeneratedTask:
    """A task whose sessions are drawn from a seed; the first ones do not depend on how many are drawn."""

    name: str
    group: str
    build: Callable[[Random, int], list[Session]]  # of a generator and a context; several share their document

    def sessions(self, seed: int, count: int, context: int) -> list[Session]:
        """`count` sessions of `context` tokens.

        Raises
        ------
        ValueError
            If the context is too short for the records that tasks ask for.
        """
        if context < MIN_CONTEXT:
            raise ValueError(f"a context of {context} tokens is too short for {self.name}: pass {MIN_CONTEXT} or more")
        drawn: list[Session] = []
        for i in count_up():
            if len(drawn) >= count:
                return drawn[:count]
            drawn += self.build(Random(f"{self.name} {seed} {i}"), context)


def words(least: int, most: int | None = None) -> DrawValue:
    """Values of so many words."""
    return lambda rng: doc.draw_words(rng, rng.randint(least, most or least))


def number(rng: Random) -> tuple[int, ...]:
    """A value of 5 digits."""
    return doc.draw_number(rng, 5)


def draw_chains(rng: Random, keys: Sequence[Key], length: int, value: DrawValue) -> Iterator[list[doc.Record]]:
    """Chains of `length` records, until the keys are used up."""
    for i in range(0, len(keys) - length + 1, length):
        yield doc.chain(keys[i : i + length], [value(rng) for _ in range(length)])


def record_lines(chain: Sequence[doc.Record]) -> list[doc.Line]:
    """The lines of a chain."""
    return [record.line() for record in chain]


def take(groups: Iterable[list[doc.Line]], room: float) -> list[doc.Line]:
    """Lines of as many groups as `room` tokens hold."""
    lines: list[doc.Line] = []
    for group in groups:
        room -= sum(map(len, group))
        if room < 0:
            break
        lines += group
    return lines


def join(lines: Sequence[doc.Line]) -> list[int]:
    """Lines as one text."""
    return [token for line in lines for token in line]


def most_keys(context: int) -> int:
    """A bound on the records of two-word keys that fit a document: each has six tokens or more."""
    return context // 6


def one_turn(document: list[doc.Line], question: list[int], expected: Expected, ignore_eos: bool = False) -> Session:
    """A document and a question; the answer may be as long as the right one."""
    prompt = [*join(document), *question]
    turn = Turn(prompt, len(expected.answer), expected, ignore_eos)
    return Session((turn,), len(prompt) + turn.max_new_tokens)


def ask_chains(
    rng: Random,
    context: int,
    *,
    sessions: int = 1,
    asked: int = 1,
    length: int = 1,
    value: DrawValue,
    filler: doc.Filler = doc.word_filler,
    distractors: float = DISTRACTORS,
    keys: DrawKeys = doc.draw_keys,
    in_order: bool = False,
) -> list[Session]:
    """Sessions over one document; each asks at once for the first records of its own `asked` chains.

    A chain has `length` records, at random depths among other chains of the same kind, which take a share of
    `distractors` of the document, and filler. Where `sessions` is above 1, all values must have one length: all
    answers have the same number of tokens then.
    """
    chains = draw_chains(rng, keys(rng, most_keys(context)), length, value)
    targets = [[next(chains) for _ in range(asked)] for _ in range(sessions)]
    lines = [line for group in targets for chain in group for line in record_lines(chain)]
    questions = [doc.question([chain[0].key for chain in group]) for group in targets]
    scores = [Expected(join([doc.answer(chain) for chain in group]), records, in_order) for group in targets]
    room = context - len(questions[0]) - len(scores[0].answer)
    others = take(map(record_lines, chains), distractors * (room - sum(map(len, lines))))
    document = doc.place(rng, lines, doc.draw_depths(rng, len(lines)), room, others, filler)
    return [one_turn(document, *pair, ignore_eos=asked > 1) for pair in zip(questions, scores, strict=True)]
