"""FP8 numbers are rounded as asked and read back as they are, in torch and in Triton alike."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from freekv_kernels import fp8, fp8_triton
from tests.support.fp8 import NUMBERS, above, below

IS_NUMBER = NUMBERS.isfinite()


def _convert(x_ptr, codes_ptr, low_ptr, high_ptr, numbers_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(low_ptr + i, fp8_triton.encode_fp8(x, False))
    tl.store(high_ptr + i, fp8_triton.encode_fp8(x, True))
    tl.store(numbers_ptr + i, fp8_triton.decode_fp8(tl.load(codes_ptr + i)).to(tl.float32))


with triton.knobs.runtime.scope():  # the interpreter is chosen when a kernel is defined
    triton.knobs.runtime.interpret = not torch.cuda.is_available()
    _convert_kernel = triton.jit(_convert)


def convert(impl, x, codes):
    """x rounded down and up, and the numbers of codes; as many of both, a power of 2."""
    x, codes = x.to(impl.device), codes.to(impl.device)
    if impl.name == "reference":
        found = fp8.encode_fp8(x, up=False), fp8.encode_fp8(x, up=True), fp8.decode_fp8(codes)
    else:
        found = torch.empty_like(codes), torch.empty_like(codes), torch.empty_like(x, dtype=torch.float32)
        _convert_kernel[(1,)](x, codes, *found, SIZE=len(x))
    return [tensor.cpu() for tensor in found]


def rounded(impl, x):
    low, high, _ = convert(impl, x, torch.zeros(len(x), dtype=torch.uint8))
    return low, high


def test_every_code_is_read_as_its_number_and_rounded_to_itself(impl):
    codes = torch.arange(256, dtype=torch.uint8)
    x = NUMBERS.nan_to_num(0).float()
    low, high, found = convert(impl, x, codes)
    assert torch.equal(found[IS_NUMBER].double(), NUMBERS[IS_NUMBER])
    is_kept = IS_NUMBER & (codes != 0x80)  # -0 is written as 0
    assert torch.equal(low[is_kept], codes[is_kept]) and torch.equal(high[is_kept], codes[is_kept])
    assert low[0x80] == high[0x80] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-40, -10, -6, 0, 8, 12])
def test_a_number_lies_between_what_it_is_rounded_to_and_nothing_else_does(impl, exponent, dtype):
    x = (torch.randn(4096) * 2.0**exponent).to(dtype)
    low, high = rounded(impl, x)
    assert torch.equal(low, below(x)) and torch.equal(high, above(x))
    inside = x.double().abs() <= fp8.LARGEST
    assert (NUMBERS[low.long()] <= x.double())[inside].all() and (NUMBERS[high.long()] >= x.double())[inside].all()


def test_beside_a_number_the_next_one_is_taken_only_on_the_far_side(impl):
    numbers = NUMBERS[IS_NUMBER].float()[:252]
    for towards in (float("-inf"), float("inf")):
        x = torch.cat((torch.nextafter(numbers, torch.tensor(towards)), torch.zeros(4)))
        low, high = rounded(impl, x)
        assert torch.equal(low, below(x)) and torch.equal(high, above(x))


def test_extremes_are_cut_off_and_no_code_is_negative_zero_or_no_number(impl):
    tiny = [1e-45, 1.2e-38, 2.0**-10, 2.0**-9, 2.0**-6]
    large = [447.9, 448.0, 448.1, 464.0, 480.0, 65504.0, 3e38, float("inf")]
    x = torch.tensor([0.0, 1.0, 1.0, *tiny, *large])
    x = torch.cat((x, -x))
    low, high = rounded(impl, x)
    assert torch.equal(low, below(x)) and torch.equal(high, above(x))
    for codes in (low, high, *rounded(impl, torch.full((2,), float("nan")))):
        assert IS_NUMBER[codes.long()].all() and (codes != 0x80).all()


def test_the_bounds_of_rounded_numbers_are_the_rounded_bounds_of_numbers(impl):
    x = torch.randn(4096) * 100
    low, high = (NUMBERS[codes.long()].view(64, 64) for codes in rounded(impl, x))
    of_bounds = rounded(impl, torch.cat((x.view(64, 64).amin(0), x.view(64, 64).amax(0))))
    assert torch.equal(low.amin(0), NUMBERS[of_bounds[0][:64].long()])
    assert torch.equal(high.amax(0), NUMBERS[of_bounds[1][64:].long()])
