"""Bounds in FP8 inside kernels; see `fp8`. In integers where a GPU before sm_89 cannot convert them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

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
    """The numbers of codes: float16, which has all of them. The bits are the same but for the bias of the exponent."""
    if cuda_capability_geq(8, 9):  # one instruction for two of them
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    bits = codes.to(tl.uint16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
