"""The arena gets the tokens of the pages, in order, from blocks or from the host store."""

from __future__ import annotations

import pytest
import torch

from freekv_kernels import PageStore

LAYERS, LAYER, PAGE = 3, 1, 8


def host_store(impl, num_pages=7, heads=2, dim=16, dtype=torch.float32):
    return impl.host(torch.randn(num_pages, LAYERS, heads, 2, PAGE, dim).to(dtype))


def no_blocks(impl, host):
    """A table where nothing is resident."""
    num_pages, _, heads, *record = host.shape
    table = torch.full((num_pages, heads), -1, dtype=torch.int32, device=impl.device)
    return torch.full((4, *record), float("nan"), dtype=host.dtype, device=impl.device), table


def fill(impl, host, pages, block_kv, table, spare_tokens=5):
    """The filled arena; its spare tokens hold 7."""
    _, _, heads, _, _, dim = host.shape
    shape = (len(pages) * PAGE + spare_tokens, 2, heads, dim)
    arena = torch.full(shape, 7.0, dtype=host.dtype, device=impl.device)
    store = PageStore(host[:, LAYER], None, block_kv, table)
    impl.ops.fill_arena(arena, store, torch.tensor(pages, device=impl.device))
    return arena.cpu()


@pytest.mark.parametrize(
    ("heads", "dim", "dtype"),
    [(2, 16, torch.float32), (1, 96, torch.bfloat16), (3, 64, torch.float16), (2, 256, torch.bfloat16)],
)
@pytest.mark.parametrize("pages", [[4], [0, 6], [5, 2, 3, 2]], ids=["one page", "first and last", "a page twice"])
def test_the_arena_holds_the_pages_token_by_token_and_nothing_past_them_changes(impl, pages, heads, dim, dtype):
    host = host_store(impl, heads=heads, dim=dim, dtype=dtype)
    before = host.clone()
    arena = fill(impl, host, pages, *no_blocks(impl, host))
    for i, page in enumerate(pages):
        for offset in range(PAGE):
            token = host[page, LAYER, :, :, offset].transpose(0, 1)  # [k | v, head, dim]
            assert torch.equal(arena[i * PAGE + offset], token)
    assert (arena[len(pages) * PAGE :] == 7).all()
    assert torch.equal(host, before)


def test_resident_heads_and_others_of_one_page_come_together(impl):
    host = host_store(impl)
    block_kv, table = no_blocks(impl, host)
    table[5, 1], table[2, 0], table[2, 1] = 3, 0, 1
    for page, head in table.cpu().ge(0).nonzero().tolist():
        block_kv[table[page, head].item()] = host[page, LAYER, head].to(impl.device)
    expected = fill(impl, host, [5, 6, 2], *no_blocks(impl, host))
    assert torch.equal(fill(impl, host, [5, 6, 2], block_kv, table), expected)


def test_storing_then_filling_the_arena_gives_the_tokens_back(impl):
    host = host_store(impl)
    block_kv, table = no_blocks(impl, host)
    table[2, 1] = 3
    summary = torch.zeros(7, 2, 2, 16, dtype=torch.uint8, device=impl.device)
    k, v = torch.randn(2, 2 * PAGE, 2, 16, device=impl.device)
    slots = torch.cat((torch.arange(PAGE) + 4 * PAGE, torch.arange(PAGE) + 2 * PAGE)).to(impl.device)
    page_starts = torch.tensor([0, PAGE, 2 * PAGE], device=impl.device)
    impl.ops.store_pages(k, v, slots, page_starts, PageStore(host[:, LAYER], summary, block_kv, table))
    arena = fill(impl, host, [4, 2], block_kv, table)
    assert torch.equal(arena[: 2 * PAGE, 0], k.cpu())
    assert torch.equal(arena[: 2 * PAGE, 1], v.cpu())


def test_more_pages_than_programs_are_all_laid_out(impl):
    host = host_store(impl, num_pages=75)
    pages = torch.randperm(75).tolist()
    arena = fill(impl, host, pages, *no_blocks(impl, host), spare_tokens=0)
    assert torch.equal(arena.view(75, PAGE, 2, 2, 16), host[pages, LAYER].permute(0, 3, 2, 1, 4))


def test_pages_and_blocks_past_two_billion_elements_are_reached(impl):
    if impl.device == "cuda":
        pytest.skip("costs gigabytes of pinned memory; untouched CPU memory costs nothing")
    record, far = 2 * 2 * PAGE * 16, 2**30 + 64  # elements of a page of one layer, and from page to page
    storage = torch.empty(2 * far + LAYERS * record, dtype=torch.float16)
    host = storage.as_strided((3, LAYERS, 2, 2, PAGE, 16), (far, record, record // 2, PAGE * 16, 16, 1))
    _, table = no_blocks(impl, host)
    block_kv = torch.empty(2**31 // (record // 2) + 2, 2, PAGE, 16, dtype=torch.float16)
    table[2, 1] = last = len(block_kv) - 1
    host[2, LAYER] = torch.randn(2, 2, PAGE, 16).half()
    block_kv[last] = host[2, LAYER, 1]
    arena = fill(impl, host, [2], block_kv, table)
    assert torch.equal(arena[:PAGE], host[2, LAYER].permute(2, 1, 0, 3))
