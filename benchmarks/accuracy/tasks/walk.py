"""Walks: records that point from each to the next, so every few tokens of an answer need another page.

Each reference is a record; the score is the share of records, key and value, that come in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from benchmarks.accuracy.tasks.build import (
    DISTRACTORS,
    GeneratedTask,
    ask_chains,
    join,
    one_turn,
    record_lines,
    take,
    words,
)
from benchmarks.accuracy.tasks.expected import Expected, records
from benchmarks.accuracy.tasks.session import Session
from benchmarks.needle import documents as doc
from benchmarks.needle import language as lang

_VARIABLES = 5  # of a chain: RULER's variable tracking has 4 hops
_NEEDLES = 48
_ROWS, _COLUMNS = 12, 4


def variables(rng: Random, context: int) -> list[Session]:
    """Variable tracking: one chain of five records among other such chains."""
    return ask_chains(rng, context, length=_VARIABLES, value=words(1), in_order=True)


def needles(rng: Random, context: int) -> list[Session]:
    """Many needles in order: one chain of 48 records (fewer below 3,072 tokens), scattered among others."""
    length = min(_NEEDLES, context // 64)
    return ask_chains(rng, context, length=length, value=words(2, 3), in_order=True)


def table(rng: Random, context: int) -> list[Session]:
    """All cells of a table in another order than they are stored in: by column, last column first.

    A cell is a record, its key the names of row and column; the cells of a row lie together. The order is given by
    pointers, from each cell to the next one to read: what is tested is reading from another page for every cell,
    not working out an order. Other tables with the same columns lie around, 12 rows each (fewer below 1,536 tokens).
    """
    rows = min(_ROWS, context // 128)
    tables = _tables(rng, rows)
    target = next(tables)
    lines = _row_lines(target, rows)
    question = doc.question([target[0].key])
    expected = Expected(doc.answer(target), records, in_order=True)
    room = context - len(question) - len(expected.answer)
    others = take((_row_lines(other, rows) for other in tables), DISTRACTORS * (room - sum(map(len, lines))))
    document = doc.place(rng, lines, sorted(doc.draw_depths(rng, rows)), room, others)
    return [one_turn(document, question, expected)]


def _tables(rng: Random, rows: int) -> Iterator[list[doc.Record]]:
    """Tables with the same columns, each as the chain of its cells in the order to read."""
    names = rng.sample(range(lang.FIRST_WORD, lang.VOCAB_SIZE), len(lang.WORDS))
    columns, names = names[:_COLUMNS], names[_COLUMNS:]
    for i in range(0, len(names) - rows + 1, rows):
        keys = [(row, column) for column in reversed(columns) for row in names[i : i + rows]]
        yield doc.chain(keys, [doc.draw_words(rng, 2) for _ in keys])


def _row_lines(table: list[doc.Record], rows: int) -> list[doc.Line]:
    """A table as it is stored: a block of lines for each row, first column first."""
    return [join(record_lines(table[row::rows][::-1])) for row in range(rows)]


TASKS = [GeneratedTask(f.__name__, "walk", f) for f in (variables, needles, table)]
