"""Rounding to FP8 by its definition: a search among the numbers that there are."""

from __future__ import annotations

import torch

_CODES = torch.arange(256, dtype=torch.uint8)
NUMBERS = _CODES.view(torch.float8_e4m3fn).double()  # of every code; NaN for two
_ORDER = torch.cat((torch.arange(0xFE, 0x80, -1), torch.arange(0x7F)))  # from -448 to 448, without -0 and NaN


def below(x: torch.Tensor) -> torch.Tensor:
    """Code of the largest number that is not above, of -448 where there is none: uint8."""
    index = torch.searchsorted(NUMBERS[_ORDER], x.double().cpu().contiguous(), right=True) - 1
    return _ORDER[index.clamp(min=0)].to(torch.uint8)


def above(x: torch.Tensor) -> torch.Tensor:
    """Code of the least number that is not below, of 448 where there is none: uint8."""
    index = torch.searchsorted(NUMBERS[_ORDER], x.double().cpu().contiguous())
    return _ORDER[index.clamp(max=len(_ORDER) - 1)].to(torch.uint8)


def bounds(low_high: torch.Tensor) -> torch.Tensor:
    """A summary, uint8, of minima and maxima ``[..., 2, n]``."""
    low, high = low_high.unbind(-2)
    return torch.stack((below(low), above(high)), -2).to(low_high.device)


def numbers(codes: torch.Tensor) -> torch.Tensor:
    """float64, on the CPU."""
    return NUMBERS[codes.cpu().long()]
