"""Several questions to one document, in SCBench's two modes: turns of one session, and sessions of their own."""

from __future__ import annotations

from random import Random

from benchmarks.accuracy.tasks.build import (
    DISTRACTORS,
    GeneratedTask,
    ask_chains,
    draw_chains,
    join,
    most_keys,
    record_lines,
    take,
    words,
)
from benchmarks.accuracy.tasks.expected import Expected, records
from benchmarks.accuracy.tasks.session import Session, Turn
from benchmarks.needle import documents as doc
from benchmarks.needle import language as lang

_TURNS = 5
_REQUESTS = 8  # sessions that share a document


def turns(rng: Random, context: int) -> list[Session]:
    """Five turns, each asking for a record that was not asked for before.

    The last one's record points on to the first one's: its answer repeats what an earlier turn answered. Each turn
    has its own score, so accuracy can be told by turn.
    """
    facts = draw_chains(rng, doc.draw_keys(rng, most_keys(context)), 1, words(2))
    singles = [record for (record, *_), _ in zip(facts, range(_TURNS), strict=False)]
    last = singles[-1]._replace(next_key=singles[0].key)
    answered = [*([record] for record in singles[:-1]), [last, singles[0]]]
    prompts = [[lang.NEWLINE] * (i > 0) + doc.question([chain[0].key]) for i, chain in enumerate(answered)]
    scores = [Expected(doc.answer(chain), records, turn=i) for i, chain in enumerate(answered)]
    room = context - sum(map(len, prompts)) - sum(len(score.answer) for score in scores)
    lines = record_lines([*singles[:-1], last])
    others = take(map(record_lines, facts), DISTRACTORS * room)
    prompts[0] = [*join(doc.place(rng, lines, doc.draw_depths(rng, _TURNS), room, others)), *prompts[0]]
    made = [Turn(prompt, len(score.answer), score) for prompt, score in zip(prompts, scores, strict=True)]
    return [Session(tuple(made), context)]


def requests(rng: Random, context: int) -> list[Session]:
    """Eight independent sessions over one document, each asking for another record of it."""
    return ask_chains(rng, context, sessions=_REQUESTS, value=words(2))


TASKS = [GeneratedTask(f.__name__, "session", f) for f in (turns, requests)]
