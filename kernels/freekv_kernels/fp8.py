"""Bounds in FP8: e4m3 numbers (4 bits of exponent, 3 of mantissa, no infinity) as bytes, rounded outwards.

A lower bound is rounded down and an upper bound up, so that what lies between two numbers lies between their bounds.
They end at -448 and 448: what lies beyond is cut off. Rounding keeps order, so the least of some rounded bounds is the
least of the numbers, rounded. The codes of no number (NaN) are never written, nor is -0.

Integers only: the same in torch and in Triton (`fp8_triton`), on every GPU, whatever it does with denormal numbers.
"""

from __future__ import annotations

import torch

LARGEST = 448.0
LARGEST_CODE = 0x7E


def encode_fp8(x: torch.Tensor, up: bool) -> torch.Tensor:
    """Round numbers to the next FP8 number below, or above.

    Parameters
    ----------
    x : floating, ``[...]``
    up : bool

    Returns
    -------
    uint8, ``[...]``
        At most `LARGEST` in magnitude.
    """
    bits = x.float().contiguous().view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    mantissa = bits & 0x7FFFFF | exponent.clamp(max=1) << 23
    shift = (141 - exponent).clamp(20, 31)  # bits that FP8 lacks: 20, and more below 2 ** -6, where its exponent ends
    kept = mantissa >> shift
    is_outwards = (bits >= 0) == up
    kept += is_outwards & (kept << shift != mantissa)
    code = (kept + ((exponent - 121).clamp(min=0) << 3)).clamp(max=LARGEST_CODE)  # a carry is the next exponent
    return (code | ((bits < 0) & (code > 0)).int() << 7).to(torch.uint8)


def encode_bounds(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Bounds ``[..., n]`` of numbers, rounded outwards: uint8, ``[..., 2, n]``."""
    return torch.stack((encode_fp8(low, up=False), encode_fp8(high, up=True)), -2)


def decode_fp8(codes: torch.Tensor) -> torch.Tensor:
    """The numbers of codes (uint8, ``[...]``): float32, ``[...]``.

    The bits lie in a 16-bit float as in FP8, but for the bias of the exponent; torch's own conversion takes 7 times as
    long on a CPU.
    """
    bits = codes.view(torch.int8).short() << 7  # the sign comes twice
    return (bits & ~0x4000).view(torch.float16).float() * 256
