"""Scores of sessions, and how sure they are: bootstrap over sessions.

A session is what is drawn independently; the references in it are not (one wrong step of a walk voids the rest), so
sessions are resampled and not references. Where no resample differs (all sessions right), bootstrap would claim to be
certain: there it is Wilson's interval, with sessions as its trials. It holds for any score in 0..1, whose variance is
at most that of a 0/1 score with the same mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 2000
_PERCENTILES = (2.5, 97.5)
_Z = 1.96  # of a 95 % interval

Scores = Sequence[Sequence[float]]  # of each session, one value in 0..1 per reference


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def score(sessions: Scores, seed: int = 0) -> Interval:
    """Mean over references, with a 95 % interval by bootstrap over sessions.

    Raises
    ------
    ValueError
        If there is no reference.
    """
    totals, counts = _sums(sessions)
    value = totals.sum() / counts.sum()
    rows = _resample(len(totals), seed)
    return _interval(value, totals[rows].sum(1) / counts[rows].sum(1), _wilson(value, len(totals)))


def share(sessions: Scores, baseline: Scores, seed: int = 0) -> Interval | None:
    """Score as a share of the baseline's on the same sessions, which are resampled in pairs; None where that is 0.

    Raises
    ------
    ValueError
        If the two do not have the same references.
    """
    (totals, counts), (whole, whole_counts) = _sums(sessions), _sums(baseline)
    if not np.array_equal(counts, whole_counts):
        raise ValueError(f"sessions differ from the baseline's: {list(counts)} and {list(whole_counts)} references")
    if whole.sum() == 0:
        return None
    value = totals.sum() / whole.sum()
    rows = _resample(len(totals), seed)
    resampled = whole[rows].sum(1)
    ratios = totals[rows].sum(1)[resampled > 0] / resampled[resampled > 0]
    scale = whole.sum() / counts.sum()
    low, high = (bound / scale for bound in _wilson(min(value * scale, 1.0), len(totals)))
    return _interval(value, ratios, (min(low, value), max(high, value)))


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean of one value for each session, of any size, with a 95 % interval by bootstrap over sessions."""
    values = np.asarray(values)
    means = values[_resample(len(values), seed)].mean(1)
    low, high = np.percentile(means, _PERCENTILES)
    return Interval(float(values.mean()), float(low), float(high))


def _sums(sessions: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the references of each session that has any."""
    scored = [session for session in sessions if len(session)]
    if not scored:
        raise ValueError("no session has a reference to score")
    return np.array([sum(session) for session in scored]), np.array([len(session) for session in scored])


def _resample(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))


def _interval(value: float, resampled: np.ndarray, without_spread: tuple[float, float]) -> Interval:
    low, high = np.percentile(resampled, _PERCENTILES) if np.ptp(resampled) > 0 else without_spread
    return Interval(float(value), float(low), float(high))


def _wilson(share: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of trials."""
    z2 = _Z * _Z / trials
    center, spread = share + z2 / 2, _Z * math.sqrt(max(share * (1 - share), 0.0) / trials + z2 / trials / 4)
    low, high = (center - spread) / (1 + z2), (center + spread) / (1 + z2)
    return (low if share > 0 else 0.0), (high if share < 1 else 1.0)
