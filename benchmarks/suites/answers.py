"""Scores of a task's samples on both sides as records: score, share of full attention, equal answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.accuracy import intervals
from benchmarks.accuracy.intervals import Interval
from benchmarks.records import RecordWriter

BASELINE = "full attention"
_COUNTED = ("recalled_per_token", "corrected_rows")


class Answers(NamedTuple):
    """What one side answered, sample by sample."""

    scores: list[float]  # in 0..1
    texts: list[str]
    retrieval: dict[str, tuple[float, str]]  # `retrieval_numbers`; empty for plain SGLang


def check_samples(prompts: Sequence[str], others: Sequence[str], where: str) -> None:
    """Refuse to compare answers to different prompts.

    Raises
    ------
    ValueError
        Says which sample differs.
    """
    if list(prompts) != list(others):
        pairs = enumerate(zip(prompts, others, strict=False))
        first = next((number for number, (one, other) in pairs if one != other), min(len(prompts), len(others)))
        raise ValueError(f"{where}: sample {first} is another on the two sides; remove the suites' folder, start again")


def write_answers(
    writer: RecordWriter, params: dict[str, Any], method: dict[str, Any], ours: Answers, full: Answers
) -> None:
    """Write a side's records; an interval is a record of its upper end, compared with its lower end.

    Parameters
    ----------
    params, method
        Suite, task and context; method and budget.
    full : Answers
        Full attention's, which may be the side itself.
    """
    params = {**params, **method, "samples": len(ours.scores)}
    scores, whole = [[score] for score in ours.scores], [[score] for score in full.scores]
    score, baseline = intervals.score(scores), intervals.score(whole)
    if ours is full:
        writer.write("score", score.value, "of 1", params)
        return _write_interval(writer, "score_high", score, params)
    writer.write("score", score.value, "of 1", params, baseline=BASELINE, baseline_value=baseline.value)
    _write_interval(writer, "score_high", score, params)
    if (share := intervals.share(scores, whole)) is not None:
        _write_interval(writer, "share_high", share, params)
    equal = [one == other for one, other in zip(ours.texts, full.texts, strict=True)]
    writer.write("equal_answers", sum(equal) / len(equal), "ratio", params)
    for name in _COUNTED:
        writer.write(name, *ours.retrieval[name], params)


def _write_interval(writer: RecordWriter, name: str, interval: Interval, params: dict[str, Any]) -> None:
    writer.write(name, interval.high, "of 1", params, baseline="low", baseline_value=interval.low)
