"""Copies of a passage: in one piece, and in pieces that lie pages apart.

Each reference is a word of the passage; the score is the share of words that come in order, after the right word.
"""

from __future__ import annotations

from random import Random

from benchmarks.accuracy.tasks.build import GeneratedTask, one_turn, take
from benchmarks.accuracy.tasks.expected import Expected, passage_steps, steps
from benchmarks.accuracy.tasks.session import Session
from benchmarks.needle import documents as doc
from benchmarks.needle import language as lang

_PASSAGE_WORDS, _SCATTERED_WORDS = 512, 96
_OTHERS = 0.5  # of the tokens that the passage leaves, at most


def passage(rng: Random, context: int) -> list[Session]:
    """A record whose value is a passage of 512 different words (a thirty-second of the context where that is less)."""
    length = min(_PASSAGE_WORDS, context // 32)
    record = doc.Record(doc.draw_words(rng, 2), tuple(_different_words(rng, length)))
    question = doc.question([record.key])
    expected = Expected(doc.answer([record]), passage_steps, in_order=True)
    room = context - len(question) - len(expected.answer)
    document = doc.place(rng, [record.line()], doc.draw_depths(rng, 1), room)
    return [one_turn(document, question, expected)]


def scattered(rng: Random, context: int) -> list[Session]:
    """A passage of 96 words after the one asked for (one for each 64 tokens of context where that is less).

    Each word has a line of its own that points to the next. Lines are in random order and more than a page of 32
    tokens apart, so every word takes another page; between them lie such lines of another passage. The last word has no
    line: the answer ends by its length.
    """
    length = min(_SCATTERED_WORDS, context // 64)
    different = _different_words(rng, len(lang.WORDS))
    passage, other_passage = different[: length + 1], different[length + 1 :]
    lines, others = doc.links(passage), doc.links(other_passage)
    answer = passage[:1] + [token for word in passage[1:] for token in (lang.POINTER, word)]
    question = doc.question([(passage[0],)])
    rng.shuffle(lines)
    depths = [i / (length - 1) for i in range(length)]
    room = context - len(question) - len(answer)
    others = take([[line] for line in others], _OTHERS * (room - sum(map(len, lines))))
    document = doc.place(rng, lines, depths, room, others)
    return [one_turn(document, question, Expected(answer, steps, in_order=True), ignore_eos=True)]


def _different_words(rng: Random, count: int) -> list[int]:
    return rng.sample(range(lang.FIRST_WORD, lang.VOCAB_SIZE), count)


TASKS = [GeneratedTask(f.__name__, "copy", f) for f in (passage, scattered)]
