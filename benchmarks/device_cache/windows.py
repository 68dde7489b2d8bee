"""Windows of requests whose page scores drift: what a replay of the device cache is asked for.

A score is a page's own level, a part that drifts, and noise. Drift brings pages that the cache has not seen for long,
noise those that it has just dropped. The two ways of `CHURN` change about as many pages and recall about as many of
these, with two windows of blocks, as SmolLM2 does on real text by the default selector (`results/real_model.md`): 0.18
and 0.07 of the selected pages behind 8,064 tokens with a budget of 2,048, 0.33 and 0.14 behind 4,096 with 512.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_LEVEL = 1.3  # standard deviation of the pages' levels; that of the drifting part is 1


class Churn(NamedTuple):
    """How scores move from step to step."""

    memory: float  # correlation of the drifting part with the step before
    noise: float  # standard deviation


CHURN = {"calm": Churn(0.95, 0.15), "restless": Churn(0.9, 0.35)}


def drifting_windows(
    churn: Churn, *, num_steps: int, num_rows: int, num_pages: int, width: int, num_fixed: int
) -> torch.Tensor:
    """Windows of the best pages, and as many fixed ones at both ends, the same in every run.

    Returns
    -------
    int32, ``[num_steps, num_rows, width]``, ascending
    """
    random = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn((num_rows, num_pages), generator=random)

    level, drifting = _LEVEL * normal(), normal()
    windows = torch.empty((num_steps, num_rows, width), dtype=torch.int32)
    for window in windows:
        drifting = churn.memory * drifting + (1 - churn.memory**2) ** 0.5 * normal()
        scores = level + drifting + churn.noise * normal()
        scores[:, :num_fixed] = scores[:, num_pages - num_fixed :] = torch.inf
        window.copy_(scores.topk(width).indices.sort().values)
    return windows


def turnover(windows: torch.Tensor, num_fixed: int) -> float:
    """Share of the selected pages that the step before did not have, mean over rows and every tenth step."""
    steps = range(1, len(windows), 10)
    new = [(windows[t, :, :, None] != windows[t - 1, :, None]).all(-1).sum(-1).float().mean() for t in steps]
    return float(sum(new) / len(new)) / (windows.shape[-1] - 2 * num_fixed)
