"""Long generation: later turns quote what the model made up in earlier ones, so the facts are in no prompt.

    ! amber falcon =                  one of many turns: the model invents a value (temperature 1)
     amber falcon river stone coral;
    ? amber falcon =                  a late turn: the model must quote that value (greedy)

The reference is read from the outputs.
"""

from __future__ import annotations

from random import Random

from benchmarks.accuracy.tasks.build import GeneratedTask
from benchmarks.accuracy.tasks.expected import Quoted
from benchmarks.accuracy.tasks.session import Session, Turn
from benchmarks.needle import documents as doc
from benchmarks.needle import language as lang

_DISTANCES = (1 / 16, 1 / 4, 1 / 2)  # of the context, from a fact to its question: 1K, 4K and 8K of 16K
_PROMPT = 12  # tokens of every turn: a line of filler, then the mark, a key and `=`
_EXPECTED = 12  # tokens that an invention takes on average: a key, 2 to 16 words, an end
_LONGEST = 24  # tokens that it may take


def sections(rng: Random, context: int) -> list[Session]:
    """Inventions as many as the context surely holds, then questions, from near to far.

    Distances are set by the mean length of an invention: over tens of turns the sum varies little. Half of a distance
    is generated, half is prompts, a line of filler in each. Up to four questions for each distance (one for each
    1,024 tokens of context) are the last turns, the only ones with a score, in the order of `_DISTANCES`.
    """
    each = max(1, min(4, context // 1024))
    questions = each * len(_DISTANCES)
    inventions = (context - questions * (_PROMPT + _LONGEST)) // (_PROMPT + _LONGEST)
    keys = doc.draw_keys(rng, inventions)
    made = [Turn(_prompt(rng, lang.INVENT, key), _LONGEST, None, temperature=1.0) for key in keys]
    for i in range(questions):
        back = round(_DISTANCES[i // each] * context / (_PROMPT + _EXPECTED))  # turns
        invented = inventions + i - back
        score = Quoted(keys[invented], invented, len(made))
        made.append(Turn(_prompt(rng, lang.QUESTION, keys[invented]), _LONGEST, score))
    return [Session(tuple(made), context)]


def _prompt(rng: Random, mark: int, key: tuple[int, ...]) -> list[int]:
    """It begins with the newline that ends the turn before."""
    asked = [mark, *key, lang.ANSWER]
    return [lang.NEWLINE, *doc.draw_words(rng, _PROMPT - len(asked) - 2), lang.NEWLINE, *asked]


TASKS = [GeneratedTask("sections", "generation", sections)]
