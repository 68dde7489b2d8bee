"""Ops that move keys and values: exact, and only where they should write."""

import pytest
import torch

from freekv_kernels import append_tokens, fill_arena, recall_blocks, store_tokens

PAGES, LAYERS, HEADS, PAGE, DIM = 6, 3, 2, 8, 4


@pytest.fixture
def host():
    return torch.randn(PAGES, LAYERS, HEADS, 2, PAGE, DIM)


def test_a_stored_token_is_where_its_slot_says_and_nothing_else_changes(host):
    before, layer = host.clone(), 1
    slots = torch.tensor([9, 10, 40, 23])
    k, v = torch.randn(4, HEADS, DIM), torch.randn(4, HEADS, DIM)
    store_tokens(host[:, layer], k, v, slots)
    for i, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, PAGE)
        for h in range(HEADS):
            assert torch.equal(host[page, layer, h, 0, offset], k[i, h])
            assert torch.equal(host[page, layer, h, 1, offset], v[i, h])
            before[page, layer, h, 0, offset], before[page, layer, h, 1, offset] = k[i, h], v[i, h]
    assert torch.equal(host, before)


def test_recall_copies_whole_records(host):
    blocks = torch.zeros(5, 2, PAGE, DIM)
    keys = torch.tensor([3 * HEADS + 1, 5 * HEADS + 0])
    recall_blocks(host, 2, keys, torch.tensor([4, 1]), blocks)
    assert torch.equal(blocks[4], host[3, 2, 1])
    assert torch.equal(blocks[1], host[5, 2, 0])
    assert (blocks[[0, 2, 3]] == 0).all()


def test_storing_then_filling_the_arena_gives_the_tokens_back(host):
    k, v = torch.randn(2 * PAGE, HEADS, DIM), torch.randn(2 * PAGE, HEADS, DIM)
    slots = torch.cat((torch.arange(PAGE) + 4 * PAGE, torch.arange(PAGE) + 2 * PAGE))
    store_tokens(host[:, 0], k, v, slots)
    arena = torch.full((3 * PAGE, 2, HEADS, DIM), 7.0)
    fill_arena(arena, host[:, 0], torch.tensor([4, 2]))
    assert torch.equal(arena[: 2 * PAGE, 0], k)
    assert torch.equal(arena[: 2 * PAGE, 1], v)
    assert (arena[2 * PAGE :] == 7).all()


def test_append_writes_host_summary_and_only_resident_blocks(host):
    layer = 1
    table = torch.full((PAGES, HEADS), -1, dtype=torch.int32)
    table[3, 0] = 2  # head 1 of page 3, and page 4, are not resident
    blocks = torch.zeros(4, 2, PAGE, DIM)
    summary = torch.randn(PAGES, HEADS, 2, DIM).sort(2).values
    before = summary.clone()
    slots = torch.tensor([3 * PAGE + 5, 4 * PAGE])
    k, v = torch.randn(2, HEADS, DIM), torch.randn(2, HEADS, DIM)
    append_tokens(k, v, slots, host[:, layer], summary, blocks, table)

    assert torch.equal(host[3, layer, :, 0, 5], k[0]) and torch.equal(host[4, layer, :, 1, 0], v[1])
    assert torch.equal(blocks[2, 0, 5], k[0, 0]) and torch.equal(blocks[2, 1, 5], v[0, 0])
    assert blocks.count_nonzero() == 2 * DIM
    assert torch.equal(summary[3, :, 0], torch.minimum(before[3, :, 0], k[0]))
    assert torch.equal(summary[3, :, 1], torch.maximum(before[3, :, 1], k[0]))
    assert torch.equal(summary[4], k[1][:, None].expand(-1, 2, -1))  # the page is opened: its past is gone
