"""Lookups: records at random depths, asked for by key. RULER's needle tasks in the needle language.

Each reference is a record that was asked for: its value must follow its key, exactly and whole. Except for `single`,
four sessions in a row ask one document for different records, so that it is prefilled once.
"""

from __future__ import annotations

from math import isqrt
from random import Random

from benchmarks.accuracy.tasks.build import GeneratedTask, ask_chains, number, words
from benchmarks.accuracy.tasks.session import Session
from benchmarks.needle import documents as doc
from benchmarks.needle import language as lang

_SESSIONS = 4  # that share a document
_VALUES = 4  # of a name, and keys asked at once


def single(rng: Random, context: int) -> list[Session]:
    """One record in filler; the kinds of value and of filler vary from session to session."""
    value = rng.choice((words(2), number))
    filler = rng.choice((doc.word_filler, doc.spelled_filler))
    return ask_chains(rng, context, value=value, filler=filler, distractors=0)


def multikey(rng: Random, context: int) -> list[Session]:
    """Every line is a record, and keys look alike: each shares its first word with many, and its second with others."""
    return ask_chains(rng, context, sessions=_SESSIONS, value=words(2), distractors=1, keys=_similar_keys)


def multivalue(rng: Random, context: int) -> list[Session]:
    """One name has four values, each under a key of its own that begins with the name; their lines lie in any order."""
    return ask_chains(rng, context, sessions=_SESSIONS, length=_VALUES, value=words(2), keys=_keys_by_name)


def multiquery(rng: Random, context: int) -> list[Session]:
    """Four questions at once."""
    return ask_chains(rng, context, sessions=_SESSIONS, asked=_VALUES, value=words(2))


def spelled(rng: Random, context: int) -> list[Session]:
    """What a pasted text looks like: most of it spelled letter by letter, keys of words, numeric values."""
    return ask_chains(rng, context, sessions=_SESSIONS, value=number, filler=doc.spelled_filler)


def _similar_keys(rng: Random, count: int) -> list[tuple[int, int]]:
    """Keys that take a quarter of all pairs of the fewest words."""
    return doc.draw_keys(rng, count, pool=isqrt(4 * count) + 1)


def _keys_by_name(rng: Random, count: int) -> list[tuple[int, int]]:
    """Keys in groups that share their first word."""
    names = rng.sample(range(lang.FIRST_WORD, lang.VOCAB_SIZE), min(count // _VALUES, len(lang.WORDS)))
    return [(name, second) for name in names for second in rng.sample(range(lang.FIRST_WORD, lang.VOCAB_SIZE), _VALUES)]


TASKS = [GeneratedTask(f.__name__, "lookup", f) for f in (single, multikey, multivalue, multiquery, spelled)]
