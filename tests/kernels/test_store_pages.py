"""A chunk is written through exactly, wherever it starts and ends, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from freekv_kernels import REFERENCE, PageStore
from tests.support import fp8

LAYERS, LAYER, PAGE = 3, 1, 8


def make(impl, num_pages=8, heads=2, dim=16, dtype=torch.float32, resident=((5, 0), (2, 1), (7, 1))):
    """The memory of one layer; `resident` (page, head) pairs have blocks, which equal their records."""
    host = torch.randn(num_pages, LAYERS, heads, 2, PAGE, dim).to(dtype)
    table = torch.full((num_pages, heads), -1, dtype=torch.int32)
    block_kv = torch.randn(len(resident) + 2, 2, PAGE, dim).to(dtype)
    for block, (page, head) in enumerate(resident, 1):
        table[page, head], block_kv[block] = block, host[page, LAYER, head]
    summary = fp8.bounds(torch.randn(num_pages, heads, 2, dim).sort(2).values)
    device = impl.device
    return SimpleNamespace(
        host=impl.host(host), summary=summary.to(device), block_kv=block_kv.to(device), table=table.to(device)
    )


def copy(memory):
    return SimpleNamespace(**{name: tensor.clone() for name, tensor in vars(memory).items()})


def store(ops, k, v, slots, memory):
    pages = torch.tensor(slots) // PAGE
    starts = [i for i in range(len(slots)) if i == 0 or pages[i] != pages[i - 1]] + [len(slots)]
    slots, starts = torch.tensor(slots, device=k.device), torch.tensor(starts, device=k.device)
    ops.store_pages(
        k, v, slots, starts, PageStore(memory.host[:, LAYER], memory.summary, memory.block_kv, memory.table)
    )
    if k.is_cuda:
        torch.cuda.synchronize()


def tokens(impl, num_tokens, heads=2, dim=16, dtype=torch.float32):
    return torch.randn(2, num_tokens, heads, dim).to(dtype).to(impl.device)


def assert_equal(memory, expected):
    for name, tensor in vars(memory).items():
        assert torch.equal(tensor.cpu(), getattr(expected, name).cpu()), name


def slots_of(*runs):
    """Slots of the tokens first to last - 1 of pages."""
    return [page * PAGE + offset for page, first, last in runs for offset in range(first, last)]


@pytest.mark.parametrize(
    ("heads", "dim", "dtype"),
    [(2, 16, torch.float32), (1, 96, torch.bfloat16), (3, 64, torch.float16), (2, 256, torch.bfloat16)],
)
@pytest.mark.parametrize(
    "runs",
    [
        [(5, 0, 8)],
        [(5, 0, 1)],
        [(5, 7, 8)],
        [(2, 3, 6)],
        [(7, 5, 8), (2, 0, 8), (5, 0, 3), (4, 1, 2), (1, 0, 5)],
    ],
    ids=["one page", "its first token", "its last token", "its middle", "several requests"],
)
def test_a_stored_token_is_where_its_slot_says_and_nothing_else_changes(impl, runs, heads, dim, dtype):
    resident = [(5, 0), (2, heads - 1), (7, 0)]
    memory, slots = make(impl, heads=heads, dim=dim, dtype=dtype, resident=resident), slots_of(*runs)
    k, v = tokens(impl, len(slots), heads, dim, dtype)
    expected = copy(memory)
    for i, (page, offset) in enumerate(divmod(slot, PAGE) for slot in slots):
        for head in range(heads):
            expected.host[page, LAYER, head, 0, offset] = k[i, head].cpu()
            expected.host[page, LAYER, head, 1, offset] = v[i, head].cpu()
            known = fp8.numbers(expected.summary[page, head]).to(k.device)
            low, high = known if offset else (k[i, head], k[i, head])
            bounds = torch.minimum(low, k[i, head]), torch.maximum(high, k[i, head])
            expected.summary[page, head] = fp8.bounds(torch.stack(bounds))
            if (block := expected.table[page, head].item()) >= 0:
                expected.block_kv[block] = expected.host[page, LAYER, head].to(k.device)
    store(impl.ops, k, v, slots, memory)
    assert_equal(memory, expected)


@pytest.mark.parametrize("cuts", [(3, 4, 21), (8, 16), (1,), (7, 9, 10, 24)])
def test_it_does_not_matter_how_a_prompt_is_cut_into_chunks(impl, cuts):
    whole, cut = make(impl), None
    cut = copy(whole)
    slots = slots_of((5, 0, 8), (2, 0, 8), (7, 0, 8), (1, 0, 5))
    k, v = tokens(impl, len(slots))
    store(impl.ops, k, v, slots, whole)
    for start, end in zip((0, *cuts), (*cuts, len(slots)), strict=True):
        store(impl.ops, k[start:end], v[start:end], slots[start:end], cut)
    assert_equal(cut, whole)
    for i, page in enumerate((5, 2, 7, 1)):
        assert torch.equal(whole.summary[page, :, 0].cpu(), fp8.below(k[i * PAGE : (i + 1) * PAGE].amin(0)))
        assert torch.equal(whole.summary[page, :, 1].cpu(), fp8.above(k[i * PAGE : (i + 1) * PAGE].amax(0)))


@pytest.mark.parametrize("past", [0x7F, 0x7E, 0xFE])  # NaN, 448, -448
def test_a_page_opened_again_forgets_its_last_owner(impl, past):
    memory = make(impl)
    memory.summary[3] = past
    k, v = tokens(impl, 2)
    store(impl.ops, k, v, slots_of((3, 0, 2)), memory)
    assert torch.equal(memory.summary[3, :, 0].cpu(), fp8.below(k.amin(0)))
    assert torch.equal(memory.summary[3, :, 1].cpu(), fp8.above(k.amax(0)))


def test_slices_of_a_fused_projection_are_read_in_place(impl):
    memory, slots = make(impl), slots_of((5, 2, 8), (3, 0, 4))
    expected = copy(memory)
    k, v = tokens(impl, len(slots))
    store(impl.ops, k, v, slots, expected)
    fused = torch.cat((torch.full_like(k, float("nan")), v, k), 1)
    _, v, k = fused.split(2, 1)
    assert not k.is_contiguous()
    store(impl.ops, k, v, slots, memory)
    assert_equal(memory, expected)


def test_more_pages_than_programs_are_all_written(impl):
    num_pages = 150
    memory = make(impl, num_pages=num_pages, heads=1, resident=())
    pages = torch.randperm(num_pages).tolist()
    slots = slots_of(*((page, 0, 2) for page in pages))
    k, v = tokens(impl, len(slots), heads=1)
    store(impl.ops, k, v, slots, memory)
    written = memory.host[pages, LAYER, 0, :, :2].to(k.device)  # [page, k | v, token]
    assert torch.equal(written[:, 0].flatten(0, 1), k[:, 0]) and torch.equal(written[:, 1].flatten(0, 1), v[:, 0])


def test_pages_and_blocks_past_two_billion_elements_are_reached(impl):
    if impl.device == "cuda":
        pytest.skip("costs gigabytes of pinned memory; untouched CPU memory costs nothing")
    memory = make(impl, num_pages=3, dtype=torch.float16, resident=())
    record, far = 2 * 2 * PAGE * 16, 2**30 + 256  # elements of a page of one layer, and from page to page
    storage = torch.empty(2 * far + LAYERS * record, dtype=torch.float16)
    memory.host = storage.as_strided((3, LAYERS, 2, 2, PAGE, 16), (far, record, record // 2, PAGE * 16, 16, 1))
    memory.block_kv = torch.empty(2**31 // (record // 2) + 2, 2, PAGE, 16, dtype=torch.float16)
    memory.table[2, 1] = last = len(memory.block_kv) - 1
    k, v = tokens(impl, PAGE, dtype=torch.float16)
    store(impl.ops, k, v, slots_of((2, 0, PAGE)), memory)
    assert torch.equal(memory.host[2, LAYER, :, 0], k.transpose(0, 1))
    assert torch.equal(memory.block_kv[last, 1], v[:, 1])


def test_the_kernel_equals_the_reference(impl):
    memory = make(impl, heads=3, dim=32, dtype=torch.bfloat16)
    expected = make_cpu_copy(memory)
    for runs in ([(5, 0, 8), (2, 0, 3), (1, 0, 2)], [(2, 3, 8), (7, 0, 8), (1, 2, 3)]):
        slots = slots_of(*runs)
        k, v = tokens(impl, len(slots), heads=3, dim=32, dtype=torch.bfloat16)
        store(impl.ops, k, v, slots, memory)
        store(REFERENCE, k.cpu(), v.cpu(), slots, expected)
        assert_equal(memory, expected)


def make_cpu_copy(memory):
    return SimpleNamespace(**{name: tensor.cpu().clone() for name, tensor in vars(memory).items()})
