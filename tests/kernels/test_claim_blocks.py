"""Claims take free blocks first, never a protected one, and keep table and owners inverse."""

import torch

from freekv_kernels import claim_blocks


class Blocks:
    def __init__(self, num_blocks: int, num_keys: int = 100):
        self.table = torch.full((num_keys,), -1, dtype=torch.int32)
        self.owner = torch.full((num_blocks,), -1, dtype=torch.int32)
        self.last_used = torch.full((num_blocks,), -1, dtype=torch.int32)
        self.free = torch.arange(num_blocks, dtype=torch.int32).flip(0)
        self.num_free = torch.tensor([num_blocks])
        self.hand = torch.zeros(1, dtype=torch.int64)

    def claim(self, keys, protect_from=10, stamp=0):
        keys = torch.tensor(keys, dtype=torch.int64)
        state = (self.table, self.owner, self.last_used, self.free, self.num_free, self.hand)
        return claim_blocks(keys, *state, protect_from, stamp).tolist()

    def check(self):
        held = (self.owner >= 0).nonzero().flatten()
        assert torch.equal(self.table[self.owner[held].long()].long(), held)
        assert (self.table >= 0).sum() == len(held)
        free = self.free[: self.num_free].tolist()
        assert sorted(free + held.tolist()) == list(range(len(self.owner)))


def test_every_key_gets_a_block_of_its_own():
    blocks = Blocks(8)
    assert sorted(blocks.claim([3, 50, 7])) == [0, 1, 2]
    assert blocks.table[[3, 50, 7]].tolist() == [0, 1, 2]
    blocks.check()


def test_free_blocks_go_before_victims():
    blocks = Blocks(4)
    blocks.claim([1, 2, 3])
    assert blocks.claim([4]) == [3]
    assert (blocks.table[[1, 2, 3, 4]] >= 0).all()


def test_a_victims_owner_loses_its_entry():
    blocks = Blocks(2)
    blocks.claim([1, 2])
    (block,) = blocks.claim([3])
    assert blocks.owner[block] == 3
    assert sorted(blocks.table[[1, 2]].tolist())[0] == -1
    blocks.check()


def test_protected_blocks_are_never_victims_and_the_last_keys_go_without():
    blocks = Blocks(4)
    blocks.claim([1, 2], stamp=10)
    blocks.claim([3, 4], stamp=9)
    claimed = blocks.claim([5, 6, 7], protect_from=10, stamp=11)
    assert claimed[2] == -1 and -1 not in claimed[:2]
    assert (blocks.table[[1, 2, 5, 6]] >= 0).all() and blocks.table[7] == -1
    blocks.check()


def test_the_hand_moves_on_so_that_victims_take_turns():
    blocks = Blocks(6)
    blocks.claim([0, 1, 2, 3, 4, 5])
    taken = [blocks.claim([10 + i])[0] for i in range(6)]
    assert sorted(taken) == [0, 1, 2, 3, 4, 5]
    blocks.check()


def test_the_search_goes_all_the_way_round_for_the_one_block_that_may_go():
    blocks = Blocks(1000, num_keys=2000)
    blocks.claim(list(range(1000)), stamp=10)
    blocks.last_used[700] = 3
    blocks.hand.fill_(701)
    assert blocks.claim([1500, 1501], protect_from=10, stamp=11) == [700, -1]
    blocks.check()


def test_claiming_nothing_changes_nothing():
    blocks = Blocks(2)
    assert blocks.claim([]) == []
    assert (blocks.owner == -1).all()
