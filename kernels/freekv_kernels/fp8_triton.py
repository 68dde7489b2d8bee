"""Bounds in FP8 inside kernels; see `fp8`. In integers, because GPUs before sm_89 cannot convert them."""

from __future__ import annotations

import triton
import triton.language as tl

from freekv_kernels.fp8 import LARGEST_CODE

_LARGEST_CODE = tl.constexpr(LARGEST_CODE)


@triton.jit
def encode_fp8(x, UP: tl.constexpr):
    """Round numbers to the next FP8 number below, or above: uint8."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 0xFF
    mantissa = (bits & 0x7FFFFF) | (tl.minimum(exponent, 1) << 23)
    shift = tl.minimum(tl.maximum(141 - exponent, 20), 31)
    kept = mantissa >> shift
    is_outwards = (bits >= 0) == UP
    kept += (is_outwards & ((kept << shift) != mantissa)).to(tl.int32)
    code = tl.minimum(kept + (tl.maximum(exponent - 121, 0) << 3), _LARGEST_CODE)
    return (code | (((bits < 0) & (code > 0)).to(tl.int32) << 7)).to(tl.uint8)


@triton.jit
def decode_fp8(codes):
    """The numbers of codes: float32."""
    codes = codes.to(tl.int32)
    magnitude = codes & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 2.0**-9, normal)  # no exponent: steps of 2 ** -9
    return tl.where(codes >= 0x80, -value, value)
