"""Released blocks are free in every layer, and nobody else's are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from freekv_kernels import BlockTables, PairList

PAGES, HEADS, BLOCKS, LAYERS = 30, 2, 40, 3
STALE = 77


def make_blocks(impl: SimpleNamespace, num_held: list[int]) -> BlockTables:
    """Layers that hold blocks for random pairs, as many as given."""
    table = torch.full((len(num_held), PAGES * HEADS), -1, dtype=torch.int32)
    owner = torch.full((len(num_held), BLOCKS), -1, dtype=torch.int32)
    last_used, free_blocks = owner.clone(), torch.full_like(owner, STALE)
    for layer, held in enumerate(num_held):
        pairs, blocks = torch.randperm(PAGES * HEADS)[:held], torch.randperm(BLOCKS).int()
        table[layer, pairs], owner[layer, blocks[:held].long()] = blocks[:held], pairs.int()
        last_used[layer, blocks[:held].long()] = 5
        free_blocks[layer, : BLOCKS - held] = blocks[held:]
    num_free = BLOCKS - torch.tensor(num_held, dtype=torch.int32)
    tensors = (table.view(-1, PAGES, HEADS), owner, last_used, free_blocks, num_free, torch.zeros_like(num_free))
    return BlockTables(*(tensor.to(impl.device) for tensor in tensors))


def make_list(impl: SimpleNamespace, pairs: list[int], capacity: int = 100) -> PairList:
    """A list whose capacity is larger than what it holds; the rest are pairs too, and must not be read."""
    entries = torch.tensor(pairs + [0] * (capacity - len(pairs)), device=impl.device)
    return PairList(entries, torch.tensor([len(pairs)], dtype=torch.int32, device=impl.device))


def check(blocks: BlockTables) -> None:
    """Table and owners are each other's inverse; the other blocks are free, once, and carry no stamp."""
    for layer in range(len(blocks.owner)):
        table, owner = blocks.table[layer].flatten().cpu(), blocks.owner[layer].cpu()
        pairs, held = (table >= 0).nonzero().flatten(), (owner >= 0).nonzero().flatten()
        assert len(pairs) == len(held)
        assert owner[table[pairs].long()].tolist() == pairs.tolist()
        free = blocks.free_blocks[layer, : blocks.num_free[layer]].tolist()
        assert sorted(free + held.tolist()) == list(range(BLOCKS))
        assert (blocks.last_used[layer, free] == -1).all()
        assert (blocks.last_used[layer, held] == 5).all()


def snapshot(blocks: BlockTables) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in blocks]


def test_a_released_key_has_no_block_and_its_block_is_free(impl):
    blocks = make_blocks(impl, [10, 20, 40])
    before = blocks.table.clone().flatten(1)
    pairs = [0, 7, 13, 14, 59]
    impl.ops.forget_blocks(make_list(impl, pairs), blocks)
    check(blocks)
    after = blocks.table.flatten(1)
    assert (after[:, pairs] == -1).all()
    others = [pair for pair in range(PAGES * HEADS) if pair not in pairs]
    assert torch.equal(after[:, others], before[:, others])


def test_blocks_that_were_free_stay_where_they_are_in_the_stack(impl):
    blocks = make_blocks(impl, [40, 30, 0])
    before, num_free = blocks.free_blocks.clone(), blocks.num_free.tolist()
    impl.ops.forget_blocks(make_list(impl, list(range(20))), blocks)
    check(blocks)
    for layer, count in enumerate(num_free):
        assert torch.equal(blocks.free_blocks[layer, :count], before[layer, :count])
        past_the_top = slice(int(blocks.num_free[layer]), None)
        assert torch.equal(blocks.free_blocks[layer, past_the_top], before[layer, past_the_top])


@pytest.mark.parametrize("num_held", [[40], [0], [40, 40], [1, 0, 39]])
def test_all_keys_may_be_released_at_once(impl, num_held):
    blocks = make_blocks(impl, num_held)
    impl.ops.forget_blocks(make_list(impl, list(range(PAGES * HEADS))), blocks)
    check(blocks)
    assert (blocks.num_free == BLOCKS).all()
    assert (blocks.table == -1).all()


def test_an_empty_list_changes_nothing(impl):
    blocks = make_blocks(impl, [10, 20, 40])
    before = snapshot(blocks)
    impl.ops.forget_blocks(make_list(impl, []), blocks)
    assert all(torch.equal(x, y) for x, y in zip(blocks, before, strict=True))


def test_keys_without_a_block_are_left_alone(impl):
    blocks = make_blocks(impl, [20, 20, 20])
    pairs = (blocks.table[0].flatten() < 0).nonzero().flatten().tolist()
    before = snapshot(blocks)
    impl.ops.forget_blocks(make_list(impl, pairs), blocks.layers(0, 1))
    assert all(torch.equal(x, y) for x, y in zip(blocks, before, strict=True))


def test_only_the_given_layers_release(impl):
    blocks = make_blocks(impl, [20, 20, 20])
    before = snapshot(blocks)
    impl.ops.forget_blocks(make_list(impl, list(range(PAGES * HEADS))), blocks.layers(1, 2))
    check(blocks)
    assert blocks.num_free.tolist() == [20, BLOCKS, 20]
    for layer in (0, 2):
        assert all(torch.equal(x[layer], y[layer]) for x, y in zip(blocks, before, strict=True))


def test_a_list_longer_than_one_pass_is_walked_to_its_end(impl, monkeypatch):
    if impl.name == "triton":
        from freekv_kernels import forget_blocks_triton

        monkeypatch.setattr(forget_blocks_triton, "_BLOCK_PAIRS", 4)
        monkeypatch.setattr(forget_blocks_triton, "_NUM_PROGRAMS", 2)
    blocks = make_blocks(impl, [40, 25])
    pairs = torch.randperm(PAGES * HEADS)[:37].tolist()
    num_held = [(blocks.table[layer].flatten()[pairs] >= 0).sum().item() for layer in range(2)]
    impl.ops.forget_blocks(make_list(impl, pairs), blocks)
    check(blocks)
    assert blocks.num_free.tolist() == [num_held[0], 15 + num_held[1]]
