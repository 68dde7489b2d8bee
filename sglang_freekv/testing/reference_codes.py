"""Bounds in FP8 and keys in a few bits, as `reference_decoder` has them: float64, and no code of the engine."""

from __future__ import annotations

import torch


def outwards(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest numbers of FP8 (e4m3) not above `low` and not below `high`, of those up to 448 in magnitude."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()].unique()
    below = torch.searchsorted(numbers, low, right=True) - 1
    above = torch.searchsorted(numbers, high)
    return numbers[below.clamp(min=0)], numbers[above.clamp(max=len(numbers) - 1)]


def coarse(keys: torch.Tensor, low: torch.Tensor, high: torch.Tensor, num_levels: int) -> torch.Tensor:
    """Keys `[tokens, D]` moved to the middle of their interval, of `num_levels` between `low` and `high` `[D]`.

    Which interval is defined in float32: a key on the border of two would be in either, if it were computed otherwise.
    """
    step = (high.float() - low.float()) / num_levels
    level = torch.where(step > 0, (keys.float() - low.float()) / step, 0.0).floor().clamp(0, num_levels - 1)
    return low + (level.double() + 0.5) * (high - low) / num_levels
