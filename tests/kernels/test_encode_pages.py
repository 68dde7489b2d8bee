"""Keys of full pages are encoded to within half a step of their channel, and no other page's codes change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from freekv_kernels import REFERENCE
from tests.support import fp8
from tests.support.op_tables import decode_keys, store_of

LAYERS, LAYER = 3, 1


def make(impl, bits, num_pages=8, heads=2, page_size=16, dim=16, dtype=torch.float32):
    """The memory of one layer; channels of different ranges, the third of them constant."""
    host = torch.randn(num_pages, LAYERS, heads, 2, page_size, dim)
    host = (host * torch.rand(dim).exp2() * 3 + 10 * torch.randn(dim)).to(dtype)
    host[..., 2] = host[..., :1, 2]
    k = host[:, LAYER, :, 0]
    codes = torch.randint(256, (num_pages, heads, page_size, dim * bits // 8), dtype=torch.uint8)
    summary = fp8.bounds(torch.stack((k.amin(2), k.amax(2)), 2))
    return SimpleNamespace(host=impl.host(host), summary=summary.to(impl.device), codes=codes.to(impl.device))


def encode(ops, slots, memory, groups=None):
    slots = torch.tensor(slots, device=memory.codes.device)
    groups = None if groups is None else torch.tensor(groups, device=slots.device)
    ops.encode_pages(slots, store_of(memory.host[:, LAYER], memory.summary), memory.codes, groups)
    if slots.is_cuda:
        torch.cuda.synchronize()


def assert_encoded(memory, pages):
    k = memory.host[pages, LAYER, :, 0].double()
    decoded, step = decode_keys(memory.summary[pages], memory.codes[pages])
    rounding = 1e-6 * (k.abs().amax(2, keepdim=True) + step)  # of fp32
    assert ((decoded - k).abs() <= step / 2 + rounding).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(
    "heads, page_size, dim, dtype",
    [
        (1, 16, 16, torch.float32),
        (2, 32, 64, torch.float16),
        (3, 16, 96, torch.bfloat16),
        (2, 32, 40, torch.float32),
        (1, 64, 128, torch.bfloat16),
    ],
    ids=str,
)
def test_a_key_of_a_full_page_is_half_a_step_away_at_most(impl, bits, heads, page_size, dim, dtype):
    memory = make(impl, bits, heads=heads, page_size=page_size, dim=dim, dtype=dtype)
    before, full = memory.codes.clone(), [5, 2, 7]
    partial = [0, 0, 4 * page_size, 3 * page_size + page_size - 2, page_size + page_size // 2]  # 0: padding
    slots = [page * page_size + page_size - 1 for page in full]
    encode(impl.ops, [*partial[:2], *slots[:2], *partial[2:], slots[2]], memory)
    assert_encoded(memory, full)
    others = [page for page in range(8) if page not in full]
    assert torch.equal(memory.codes[others], before[others])


def test_a_page_of_one_key_over_and_over_is_decoded_exactly(impl):
    memory = make(impl, 2)
    memory.host[3, LAYER, :, 0] = key = fp8.numbers(torch.randint(0x7F, (16,))).float()  # that FP8 has: no range
    memory.summary[3] = fp8.below(key).to(impl.device)
    encode(impl.ops, [3 * 16 + 15], memory)
    decoded, _ = decode_keys(memory.summary[3], memory.codes[3])
    assert torch.equal(decoded.float(), key.expand_as(decoded))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_page_of_zeros_and_ones_has_the_least_and_the_largest_codes(impl, bits):
    """Which tells where the channels of a byte are."""
    memory = make(impl, bits)
    is_one = torch.rand(16, 16) < 0.5
    is_one[0], is_one[1] = False, True
    memory.host[1, LAYER, :, 0] = is_one.float()
    memory.summary[1] = fp8.below(torch.tensor([0.0, 1.0]))[:, None].to(impl.device)
    encode(impl.ops, [31], memory)
    num_bytes = 2 * bits
    expected = torch.zeros(16, num_bytes, dtype=torch.uint8)
    for d in range(16):
        expected[:, d % num_bytes] += is_one[:, d] * (2**bits - 1 << d // num_bytes * bits)
    assert torch.equal(memory.codes[1].cpu(), expected.expand(2, -1, -1))


def test_a_key_that_fp8_cannot_bound_has_the_outermost_code(impl):
    memory = make(impl, 2)
    memory.host[3, LAYER, :, 0, 0], memory.host[3, LAYER, :, 0, 1] = -1000, 1000
    memory.summary[3] = fp8.below(torch.tensor([-448.0, 448.0]))[:, None].to(impl.device)
    encode(impl.ops, [3 * 16 + 15], memory)
    decoded, step = decode_keys(memory.summary[3], memory.codes[3])
    assert (step == 224).all()
    assert (decoded[:, 0] == -448 + 112).all() and (decoded[:, 1] == 448 - 112).all()


@pytest.mark.parametrize("heads, dim, bits", [(2, 16, 2), (3, 40, 1), (1, 96, 4)], ids=str)
def test_the_page_that_ends_a_group_takes_the_bounds_of_the_group_before_it_is_encoded(impl, heads, dim, bits):
    memory = make(impl, bits, num_pages=12, heads=heads, dim=dim)
    before = memory.summary.clone()
    none, groups = [-1] * 4, [[9, 1, 6, 4], [3, 11, 2, 8]]
    # The end of a group, the end of a page that ends none, of a group whose last page is not full, of another group.
    slots = [4 * 16 + 15, 5 * 16 + 15, 10 * 16 + 3, 8 * 16 + 15]
    encode(impl.ops, slots, memory, [groups[0], none, [7, 0, 5, 10], groups[1]])
    expected = before.clone()
    for group in groups:
        keys = memory.host[group, LAYER, :, 0]  # [4, heads, page_size, dim]
        expected[group[-1]] = fp8.bounds(torch.stack((keys.amin((0, 2)), keys.amax((0, 2))), 1)).to(impl.device)
    assert torch.equal(memory.summary, expected)
    assert not torch.equal(before[[4, 8]], expected[[4, 8]])
    assert_encoded(memory, [4, 5, 8])


def test_more_pages_than_programs_are_all_encoded(impl):
    memory = make(impl, 4, num_pages=150, heads=1)
    pages = torch.randperm(150)
    encode(impl.ops, (pages * 16 + 15).tolist(), memory)
    assert_encoded(memory, slice(None))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_kernel_equals_the_reference(impl, bits):
    memory = make(impl, bits, dtype=torch.bfloat16)
    expected = SimpleNamespace(**{name: tensor.cpu().clone() for name, tensor in vars(memory).items()})
    ended = [[-1] * 4, [5, 0, 2, 7], [-1] * 4, [6, 3, 1, 4]]
    for slots, groups in (([8, 16, 17], None), ([31, 127, 50, 79], ended)):
        encode(impl.ops, slots, memory, groups)
        encode(REFERENCE, slots, expected, groups)
        assert torch.equal(memory.codes.cpu(), expected.codes)
        assert torch.equal(memory.summary.cpu(), expected.summary)


def test_pages_past_two_billion_elements_are_reached(impl):
    """Memory that nobody touches costs nothing on a CPU; the other pages overlap."""
    if impl.device == "cuda":
        pytest.skip("costs gigabytes of pinned memory")
    heads, page_size, dim, between = 2, 32, 128, 4160
    last = 2**31 // (heads * page_size * dim // 2) + 1
    k = torch.randn(heads, page_size, dim, dtype=torch.float16)
    record = heads * 2 * page_size * dim
    storage = torch.empty(last * between + record, dtype=torch.float16)
    strides = (between, 2 * page_size * dim, page_size * dim, dim, 1)
    host = storage.as_strided((last + 1, heads, 2, page_size, dim), strides)
    host[last, :, 0] = k
    summary = torch.empty(last + 1, heads, 2, dim, dtype=torch.uint8)
    summary[last] = fp8.bounds(torch.stack((k.amin(1), k.amax(1)), 1))
    codes = torch.empty(last + 1, heads, page_size, dim // 2, dtype=torch.uint8)
    impl.ops.encode_pages(torch.tensor([last * page_size + page_size - 1]), store_of(host, summary), codes)
    decoded, step = decode_keys(summary[last], codes[last])
    assert ((decoded - k.double()).abs() <= 0.501 * step).all()
