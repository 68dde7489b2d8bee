"""Documents of the needle language: records at given or random depths in filler, with an exact number of tokens.

Everything is drawn from the `random.Random` that is passed in, so a seed determines a document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from typing import NamedTuple

from benchmarks.needle import language as lang

Line = list[int]  # tokens, the newline included
Filler = Callable[[Random], Line]


class Record(NamedTuple):
    """A fact. With `next_key` it points on to another record instead of ending."""

    key: tuple[int, ...]
    value: tuple[int, ...]
    next_key: tuple[int, ...] | None = None

    def line(self) -> Line:
        """Its line in a document."""
        end = [lang.END] if self.next_key is None else [lang.POINTER, *self.next_key]
        return [lang.RECORD, *self.key, *self.value, *end, lang.NEWLINE]


def chain(keys: Sequence[tuple[int, ...]], values: Sequence[tuple[int, ...]]) -> list[Record]:
    """Records that point from each to the next; the last one ends."""
    return [Record(*pair) for pair in zip(keys, values, [*keys[1:], None], strict=True)]


def links(words: Sequence[int]) -> list[Line]:
    """Lines without values: each word of a passage points to the next."""
    return [Record((a,), (), (b,)).line() for a, b in pairwise(words)]


def question(keys: Sequence[tuple[int, ...]]) -> Line:
    """The tokens that ask for these keys, in this order; the answer follows."""
    return [token for key in keys for token in (lang.QUESTION, *key)] + [lang.ANSWER]


def answer(records: Sequence[Record]) -> list[int]:
    """What a chain of records (or one record) is answered with."""
    parts = [[lang.POINTER] * (i > 0) + [*record.key, *record.value] for i, record in enumerate(records)]
    return [token for part in parts for token in part] + [lang.END]


def draw_words(rng: Random, count: int) -> tuple[int, ...]:
    """`count` words, with repetition."""
    return tuple(rng.randrange(lang.FIRST_WORD, lang.VOCAB_SIZE) for _ in range(count))


def draw_number(rng: Random, digits: int) -> tuple[int, ...]:
    """A number with a blank before it, one token per digit."""
    return (lang.BLANK, *(rng.choice(lang.DIGITS) for _ in range(digits)))


def draw_keys(rng: Random, count: int, pool: int | None = None) -> list[tuple[int, int]]:
    """`count` different keys of two words; with `pool`, words of few: keys look alike."""
    words = rng.sample(range(lang.FIRST_WORD, lang.VOCAB_SIZE), pool or len(lang.WORDS))
    if count > len(words) ** 2 // 2:
        raise ValueError(
            f"{count} keys do not fit {len(words)} words; at most {len(words) ** 2 // 2}: pass a larger pool"
        )
    keys: dict[tuple[int, int], None] = {}
    while len(keys) < count:
        keys[rng.choice(words), rng.choice(words)] = None
    return list(keys)


def word_filler(rng: Random) -> Line:
    """A line of 8 to 24 random words."""
    return [*draw_words(rng, rng.randint(8, 24)), lang.NEWLINE]


def spelled_filler(rng: Random) -> Line:
    """A line of made-up words, letter by letter, listed words and numbers among them: what pasted text looks like."""
    line: Line = []
    for _ in range(rng.randint(3, 8)):
        kind = rng.random()
        if kind < 0.5:
            line += [lang.BLANK, *rng.choices(lang.LETTERS, k=rng.randint(2, 8))]
        elif kind < 0.9:
            line += draw_words(rng, rng.randint(1, 3))
        else:
            line += draw_number(rng, rng.randint(1, 4))
    return [*line, lang.NEWLINE]


def filler_with(words: Sequence[int], share: float) -> Filler:
    """Filler in which `words` take this share of the places, all alike."""

    def filler(rng: Random) -> Line:
        return [rng.choice(words) if rng.random() < share else t for t in word_filler(rng)[:-1]] + [lang.NEWLINE]

    return filler


def mix(rng: Random, lines: Sequence[Line], length: int, filler: Filler = word_filler) -> list[Line]:
    """Scatter `lines`, in random order, in filler; `length` tokens in all.

    Raises
    ------
    ValueError
        If the lines alone are longer.
    """
    room = length - sum(map(len, lines))
    if room < 0:
        raise ValueError(f"lines of {length - room} tokens do not fit a document of {length}: pass fewer lines")
    mixed = [*lines, *fill(rng, room, filler)]
    rng.shuffle(mixed)
    return mixed


def fill(rng: Random, length: int, filler: Filler = word_filler) -> list[Line]:
    """Lines of filler, `length` tokens in all."""
    lines, left = [], length
    while left > 0:
        lines.append(filler(rng)[:left])
        left -= len(lines[-1])
    return lines


def draw_depths(rng: Random, count: int) -> list[float]:
    """`count` different depths from 0 to 1, in random order: of 40 even ones, as in RULER, or of `count` if more."""
    steps = max(40, count)
    return [step / (steps - 1) for step in rng.sample(range(steps), count)]


def place(
    rng: Random,
    lines: Sequence[Line],
    depths: Sequence[float],
    length: int,
    others: Sequence[Line] = (),
    filler: Filler = word_filler,
) -> list[Line]:
    """Put each of `lines` at its depth among `others` and filler, `length` tokens in all.

    A depth is a share of the way from the document's start to the last place where the line fits; the line begins
    there or with the next line.

    Raises
    ------
    ValueError
        If `lines` and `others` alone are longer.
    """
    room = length - sum(map(len, lines))
    if room < sum(map(len, others)):
        raise ValueError(
            f"records of {length - room + sum(map(len, others))} tokens do not fit a document of {length}: "
            "pass fewer of them or a longer context"
        )
    background = iter(mix(rng, others, room, filler))
    placed: list[Line] = []
    at = 0
    for depth, line in sorted(zip(depths, lines, strict=True), key=lambda pair: pair[0]):
        while at < depth * (length - len(line)) and (before := next(background, None)) is not None:
            placed.append(before)
            at += len(before)
        placed.append(line)
        at += len(line)
    return [*placed, *background]
