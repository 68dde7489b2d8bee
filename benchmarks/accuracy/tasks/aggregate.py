"""Aggregation: an answer that lies on no page. Retrieval is expected to lose here first.

Each reference is a common word, in any order.
"""

from __future__ import annotations

from random import Random

from benchmarks.accuracy.tasks.build import GeneratedTask, one_turn
from benchmarks.accuracy.tasks.expected import Expected, words
from benchmarks.accuracy.tasks.session import Session
from benchmarks.needle import documents as doc
from benchmarks.needle import language as lang


def common(rng: Random, context: int) -> list[Session]:
    """A text in which four words take 10 to 20 % of the places together."""
    chosen = rng.sample(range(lang.FIRST_WORD, lang.VOCAB_SIZE), 4)
    question = [lang.COMMON, lang.ANSWER]
    expected = Expected([*chosen, lang.END], words)
    room = context - len(question) - len(expected.answer)
    document = doc.fill(rng, room, doc.filler_with(chosen, rng.uniform(0.1, 0.2)))
    return [one_turn(document, question, expected)]


TASKS = [GeneratedTask("common", "aggregate", common)]
