"""Scores of sessions, and how sure they are."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.accuracy import intervals


def test_score_is_the_mean_over_references():
    assert intervals.score([[1, 0, 0], [1]]).value == 0.5


@pytest.mark.parametrize(("mean", "references"), [(0.5, 8), (0.85, 1)])
def test_nineteen_of_twenty_intervals_cover_the_truth(mean: float, references: int):
    """References of a session are alike, which an interval over references would take for certainty."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        level = rng.beta(mean * 3, (1 - mean) * 3, size=40)
        found = intervals.score((rng.random((references, 40)) < level).T.astype(float).tolist(), seed=trial)
        covered += found.low <= mean <= found.high
    assert 0.9 <= covered / 200 <= 0.985


def test_all_right_is_not_certain():
    few, many = intervals.score([[1.0]] * 5), intervals.score([[1.0]] * 100)
    assert few.value == few.high == many.high == 1
    assert few.low < 0.7 < 0.95 < many.low < 1


def test_all_wrong_is_not_certain():
    found = intervals.score([[0.0, 0.0]] * 10)
    assert found.value == found.low == 0
    assert 0.2 < found.high < 0.4


def test_one_session_has_a_wide_interval():
    found = intervals.score([[0.5, 0.5]])
    assert found.low < 0.2 < 0.8 < found.high


def test_the_same_sessions_give_the_same_interval():
    sessions = [[float(i % 3 == 0)] for i in range(20)]
    assert intervals.score(sessions) == intervals.score(sessions)
    assert intervals.score(sessions).low != intervals.score(sessions[:10]).low


def test_sessions_without_references_do_not_count():
    assert intervals.score([[], [1.0], []]) == intervals.score([[1.0]])
    with pytest.raises(ValueError, match="no session"):
        intervals.score([[], []])


def test_a_share_pairs_the_sessions():
    """Sessions differ in how hard they are, a method loses a tenth on each: the share is known far better."""
    whole = [[i / 20] for i in range(1, 21)]
    part = [[0.9 * value] for (value,) in whole]
    share, score = intervals.share(part, whole), intervals.score(part)
    assert share.value == pytest.approx(0.9)
    assert share.high - share.low < 1e-6 < 0.1 < score.high - score.low


def test_a_share_of_nothing_is_none():
    assert intervals.share([[1.0]], [[0.0]]) is None


def test_a_share_where_both_are_right_is_not_certain():
    found = intervals.share([[1.0]] * 10, [[1.0]] * 10)
    assert found.value == found.high == 1
    assert 0.6 < found.low < 0.8


def test_other_sessions_than_the_baseline_are_refused():
    with pytest.raises(ValueError, match="differ from the baseline"):
        intervals.share([[1.0], [1.0]], [[1.0]])
