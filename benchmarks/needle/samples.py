"""Training samples: a document, then a tail of questions with their answers; labels say what each token tests.

A sample of a few hundred tokens stands for a long context: between lines, positions jump, up to `MAX_POSITION`.
No label, weight or position knows of pages, summaries or windows: nothing here favours a retrieval method.
"""

from __future__ import annotations

import enum
from random import Random
from typing import NamedTuple

import torch

from benchmarks.needle import documents as doc
from benchmarks.needle import language as lang

MAX_POSITION = 40_000
_PUNCTUATION = (*lang.tokens_of("@?!#;:,.()[]|-*`'\"/="), lang.ANSWER, lang.POINTER)


class Label(enum.IntEnum):
    """What predicting a token of the tail takes."""

    NONE = 0  # not predicted
    KEY = 1  # repeat a key, of the question or after a pointer
    JUMP = 2  # find a record by its key: the first token of a value
    COPY = 3  # read on
    NEXT = 4  # the next key of several that were asked for
    COMMON = 5  # name a common word
    INVENT = 6  # any word: random in the samples


class Tail:
    """Tokens after a document, with a label each."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.labels: list[int] = []

    def add(self, tokens: list[int] | tuple[int, ...], label: Label) -> None:
        self.tokens += tokens
        self.labels += [label] * len(tokens)

    def add_answer(self, records: list[doc.Record], value_label: Label | None = None) -> None:
        """The answer that follows a chain of records."""
        for i, record in enumerate(records):
            self.add([lang.POINTER] * (i > 0), Label.COPY)
            self.add(record.key, Label.KEY)
            self.add(record.value[:1], value_label or Label.JUMP)
            self.add(record.value[1:], value_label or Label.COPY)
        self.add([lang.END], Label.COPY)

    def ask(self, records: list[doc.Record]) -> None:
        """A question for the first of a chain of records, its answer, and the end of the line."""
        self.add(doc.question([records[0].key]), Label.NONE)
        self.add_answer(records)
        self.add([lang.NEWLINE], Label.NONE)

    def ask_links(self, words: list[int]) -> None:
        """A question for the first of `words`, answered by following `documents.links`."""
        self.add(doc.question([words[:1]]), Label.NONE)
        self.add(words[:1], Label.KEY)
        for word in words[1:]:
            self.add([lang.POINTER], Label.COPY)
            self.add([word], Label.JUMP)
        self.add([lang.NEWLINE], Label.NONE)


class Batch(NamedTuple):
    """int64, ``[batch, length]`` each; the tail is the last `tail` tokens."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


def _value(rng: Random, room: int) -> tuple[int, ...]:
    kind = rng.random()
    if kind < 0.65:
        return doc.draw_words(rng, rng.randint(1, 4))
    if kind < 0.85:
        return doc.draw_number(rng, rng.randint(2, 7))
    if kind < 0.95:
        return (lang.BLANK, *rng.choices(lang.LETTERS + lang.DIGITS, k=rng.randint(3, 8)))
    return doc.draw_words(rng, rng.randint(8, max(16, room // 8)))


def _key(rng: Random, words: tuple[int, int]) -> tuple[int, ...]:
    """Mostly the two words; sometimes more, or spelled."""
    kind = rng.random()
    if kind < 0.85:
        return words
    if kind < 0.93:
        return (*words, *doc.draw_words(rng, 1))
    return (lang.BLANK, *rng.choices(lang.LETTERS, k=rng.randint(3, 7)), words[0])


def _lines_within(rng: Random, lines: list[doc.Line], length: int) -> list[doc.Line]:
    """A document of filler and these lines, each sample with its own kind of filler."""
    return doc.mix(rng, lines, length, rng.choice((doc.word_filler, doc.word_filler, doc.spelled_filler)))


def _chains(rng: Random, room: int) -> list[list[doc.Record]]:
    """Chains of one to many records that fit `room` tokens of document."""
    left = rng.choice((0.02, 0.3, 0.6, 0.6, 0.95, 0.95, 0.95)) * room
    pool = rng.choice((None, None, 32, 64))
    limit = min(room // 5, (pool or 1000) ** 2 // 2)
    words = doc.draw_keys(rng, limit, pool)
    longest = rng.choice((1, 1, 4, 64))
    chains: list[list[doc.Record]] = []
    while words:
        keys = [_key(rng, pair) for pair in words[: rng.randint(1, longest)]]
        records, used = [], 0
        for record in doc.chain(keys, [_value(rng, room) for _ in keys]):
            used += len(record.line())
            if used > left:
                break
            records.append(record)
        if not records:
            break
        records[-1] = records[-1]._replace(next_key=None)
        del words[: len(records)]
        left -= used
        chains.append(records)
    return chains or [[doc.Record(doc.draw_words(rng, 2), doc.draw_words(rng, 2))]]


def ask(rng: Random, document: int, tail_length: int) -> tuple[list[doc.Line], Tail]:
    """Single questions, followed through their chains."""
    chains = _chains(rng, document)
    tail = Tail()
    while len(tail.tokens) < tail_length:
        for records in rng.sample(chains, len(chains)):
            tail.ask(records)
    return _lines_within(rng, [r.line() for records in chains for r in records], document), tail


def pasted(rng: Random, document: int, tail_length: int) -> tuple[list[doc.Line], Tail]:
    """Single questions over text such as people paste: spelled words, punctuation, the language's own marks as well."""

    def text(rng: Random) -> doc.Line:
        line = doc.spelled_filler(rng)
        for _ in range(rng.randint(0, 6)):
            line.insert(rng.randrange(len(line)), rng.choice(_PUNCTUATION))
        return line

    def word() -> tuple[int, ...]:
        spelled = (lang.BLANK, *rng.choices(lang.LETTERS, k=rng.randint(2, 8)))
        return spelled if rng.random() < 0.5 else doc.draw_words(rng, 1)

    records, room = [], rng.choice((0.1, 0.3, 0.6)) * document
    while not records or room > 0:
        records.append(doc.Record(word() + word(), _value(rng, 128)))
        room -= len(records[-1].line())
    tail = Tail()
    while len(tail.tokens) < tail_length:
        for record in rng.sample(records, len(records)):
            tail.ask([record])
    return doc.mix(rng, [record.line() for record in records], document, text), tail


def ask_several(rng: Random, document: int, tail_length: int) -> tuple[list[doc.Line], Tail]:
    """Questions for several keys at once; all values of a document have the same number of words."""
    words = rng.choice((1, 2, 2, 3))
    count = max(2, int(rng.choice((0.3, 0.9)) * document) // (words + 5))
    records = [doc.Record(key, doc.draw_words(rng, words)) for key in doc.draw_keys(rng, count, None)]
    tail = Tail()
    while len(tail.tokens) < tail_length:
        asked = rng.sample(records, min(rng.randint(2, 12), count))
        tail.add(doc.question([record.key for record in asked]), Label.NONE)
        for i, record in enumerate(asked):
            start = len(tail.labels)
            tail.add_answer([record])
            tail.labels[start] = Label.NEXT if i else Label.KEY
        tail.add([lang.NEWLINE], Label.NONE)
    return _lines_within(rng, [record.line() for record in records], document), tail


def scattered(rng: Random, document: int, tail_length: int) -> tuple[list[doc.Line], Tail]:
    """A passage whose words lie in the document one by one: each points to the next."""
    words = rng.sample(range(lang.FIRST_WORD, lang.VOCAB_SIZE), min(len(lang.WORDS), document // 6))
    tail = Tail()
    while len(tail.tokens) < tail_length:
        start = rng.randrange(len(words) - 1)
        tail.ask_links(words[start : start + 1 + tail_length // 2])
    return _lines_within(rng, doc.links(words), document), tail


def invent(rng: Random, document: int, tail_length: int) -> tuple[list[doc.Line], Tail]:
    """Values that the tail makes up, and questions for them."""
    tail, known = Tail(), []
    while len(tail.tokens) < tail_length:
        if not known or rng.random() < 0.4:
            record = doc.Record(doc.draw_words(rng, 2), doc.draw_words(rng, rng.randint(2, 16)))
            known.append(record)
            tail.add([lang.INVENT, *record.key, lang.ANSWER], Label.NONE)
            tail.add_answer([record], Label.INVENT)
            tail.add([lang.NEWLINE], Label.NONE)
        else:
            tail.ask([rng.choice(known)])
    return _lines_within(rng, [], document), tail


def common(rng: Random, document: int, tail_length: int) -> tuple[list[doc.Line], Tail]:
    """A text in which four words are common."""
    words = rng.sample(range(lang.FIRST_WORD, lang.VOCAB_SIZE), 4)
    filler = doc.filler_with(words, rng.choice((0.1, 0.2, 0.4)))
    tail = Tail()
    while len(tail.tokens) < tail_length:
        tail.add([lang.COMMON, lang.ANSWER], Label.NONE)
        tail.add(rng.sample(words, 4), Label.COMMON)
        tail.add([lang.END], Label.COPY)
        tail.add([lang.NEWLINE], Label.NONE)
    return doc.fill(rng, document, filler), tail


def repeat(rng: Random, document: int, tail_length: int) -> tuple[list[doc.Line], Tail]:
    """Any tokens, and a part of them again and again: what a model learns first."""
    tokens = [rng.randrange(lang.VOCAB_SIZE) for _ in range(document)]
    start, length = rng.randrange(document // 2), rng.randint(16, document // 2)
    tail = Tail()
    while len(tail.tokens) < tail_length:
        tail.add(tokens[start : start + 1], Label.NONE)
        tail.add(tokens[start + 1 : start + length], Label.COPY)
    return [tokens], tail


FAMILIES = {f.__name__: f for f in (repeat, ask, pasted, ask_several, scattered, invent, common)}


def _positions(rng: Random, lines: list[list[int]], max_position: int) -> list[int]:
    """Consecutive within a line, with random gaps between lines."""
    total = sum(map(len, lines))
    span = int(total * (max_position / total) ** rng.random()) if max_position > total else total
    weights = [rng.random() ** 3 for _ in lines]
    scale = (span - total) / sum(weights)
    positions, at = [], 0.0
    for line, weight in zip(lines, weights, strict=True):
        at += weight * scale
        positions += range(int(at), int(at) + len(line))
        at += len(line)
    return positions


def draw_batch(
    rng: Random, families: dict[str, float], batch: int, document: int, tail: int, max_position: int = MAX_POSITION
) -> Batch:
    """`batch` samples of `document` + `tail` tokens, of families drawn by weight."""
    rows: tuple[list, list, list] = ([], [], [])
    for name in rng.choices(list(families), weights=list(families.values()), k=batch):
        lines, questions = FAMILIES[name](rng, document, tail)
        if sum(map(len, lines)) != document:
            raise AssertionError(f"family {name}: {sum(map(len, lines))} tokens, not {document}")
        tail_tokens = questions.tokens[:tail]
        rows[0].append([token for line in lines for token in line] + tail_tokens)
        # The tail is what was generated: one text without gaps but for the one before it.
        rows[1].append(_positions(rng, [*lines, tail_tokens], max_position))
        rows[2].append([Label.NONE] * document + questions.labels[:tail])
    return Batch(*(torch.tensor(values) for values in rows))
