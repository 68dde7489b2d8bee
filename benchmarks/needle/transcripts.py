"""Transcripts: a document, then questions with their right answers, as a model without mistakes would leave them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

import torch

from benchmarks.needle import documents as doc
from benchmarks.needle import language as lang
from benchmarks.needle.samples import Label, Tail


class Transcript(NamedTuple):
    """Document and tail, as many tokens together as was asked for."""

    family: str  # of FAMILIES
    document: list[int]
    tail: list[int]
    labels: list[int]  # of the tail: what predicting each token takes; NONE for the questions

    @property
    def steps(self) -> torch.Tensor:
        """Decode steps, int64, as indices into the tail: a generated token that predicts another.

        The first token of an answer is predicted by the prompt, and the last one predicts nothing.
        """
        is_answer = torch.tensor(self.labels) != Label.NONE
        return (is_answer[:-1] & is_answer[1:]).nonzero().flatten()


def _keys(rng: Random, lines: int, tokens_per_line: int, pool: int | None = None) -> list[tuple[int, int]]:
    return doc.draw_keys(rng, lines // tokens_per_line, pool)


def lookup(rng: Random, room: int, tail: Tail) -> list[doc.Line]:
    """Values of a few words among filler."""
    return _lookup(rng, _keys(rng, room // 3, 8), tail)


def look_alike(rng: Random, room: int, tail: Tail) -> list[doc.Line]:
    """As lookup, with nothing but records, whose keys share their words."""
    return _lookup(rng, _keys(rng, room, 9, pool=64), tail)


def _lookup(rng: Random, keys: list[tuple[int, int]], tail: Tail) -> list[doc.Line]:
    records = [doc.Record(key, doc.draw_words(rng, rng.randint(1, 4))) for key in keys]
    for record in rng.sample(records, 24):
        tail.ask([record])
    return [record.line() for record in records]


def walk(rng: Random, room: int, tail: Tail) -> list[doc.Line]:
    """Chains of 16 records: every hop leads to another place."""
    keys = _keys(rng, room // 2, 10)
    chains = [doc.chain(part, [doc.draw_words(rng, 2) for _ in part]) for part in zip(*[iter(keys)] * 16, strict=False)]
    for chain in rng.sample(chains, min(2, len(chains))):
        tail.ask(chain)
    return [record.line() for chain in chains for record in chain]


def scattered(rng: Random, room: int, tail: Tail) -> list[doc.Line]:
    """A passage whose words lie apart, each pointing to the next."""
    words = rng.sample(range(lang.FIRST_WORD, lang.VOCAB_SIZE), min(len(lang.WORDS), room // 12))
    for _ in range(2):
        start = rng.randrange(len(words) - 48)
        tail.ask_links(words[start : start + 48])
    return doc.links(words)


def passage(rng: Random, room: int, tail: Tail) -> list[doc.Line]:
    """Long values: reading on, word by word."""
    records = [doc.Record(key, doc.draw_words(rng, 96)) for key in _keys(rng, room // 2, 101)]
    for record in rng.sample(records, 2):
        tail.ask([record])
    return [record.line() for record in records]


FAMILIES: dict[str, Callable[[Random, int, Tail], list[doc.Line]]] = {
    f.__name__: f for f in (lookup, look_alike, walk, scattered, passage)
}
MIN_CONTEXT = 2048  # tokens


def draw_transcript(family: str, seed: int, context: int) -> Transcript:
    """Draw a transcript of exactly `context` tokens.

    Raises
    ------
    ValueError
        If the family is unknown, or the context too short for its questions.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: expected one of {', '.join(FAMILIES)}")
    if context < MIN_CONTEXT:
        raise ValueError(f"a transcript of {context} tokens is too short: expected at least {MIN_CONTEXT}")
    rng, tail = Random(f"{family} {seed} {context}"), Tail()
    lines = FAMILIES[family](rng, context - 512, tail)
    document = doc.mix(rng, lines, context - len(tail.tokens))
    return Transcript(family, [token for line in document for token in line], tail.tokens, tail.labels)
