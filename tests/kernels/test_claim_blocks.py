"""Claims take free blocks first, never a protected one, and keep block table and owners inverse.

Which victim goes, and which pair gets which block, is up to the implementation.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from freekv_kernels import BlockTables, Claim, Count, MissList, PairList

STALE = 77
STEP = 5


class Blocks:
    """The tables of some layers, and claims of lists with a capacity larger than what they hold."""

    def __init__(self, impl: SimpleNamespace, num_blocks: int, num_pairs: int = 100, layers: int = 1) -> None:
        self.impl = impl
        self.counters = torch.zeros(len(Count), dtype=torch.int64, device=impl.device)
        per_block = {"size": (layers, num_blocks), "dtype": torch.int32, "device": impl.device}
        free = torch.arange(num_blocks, dtype=torch.int32, device=impl.device).flip(0)
        self.tables = BlockTables(
            table=torch.full((layers, num_pairs // 2, 2), -1, dtype=torch.int32, device=impl.device),
            owner=torch.full(fill_value=-1, **per_block),
            last_used=torch.full(fill_value=-1, **per_block),
            free_blocks=free.repeat(layers, 1),
            num_free=torch.full((layers,), num_blocks, dtype=torch.int32, device=impl.device),
            hand=torch.zeros(layers, dtype=torch.int32, device=impl.device),
        )

    def claim(self, pairs, layers=None, step=STEP, claim=Claim.AS_OLD):
        """Claim from a PairList, in all layers if none are given; None."""
        wanted = PairList(self._list(pairs), self._count(pairs))
        self._claim(wanted, layers or (0, len(self.tables.owner)), step, claim)

    def claim_misses(self, pairs, step=STEP, claim=Claim.AS_OLD) -> list[int]:
        """Claim from a MissList in layer 0; the blocks to fill."""
        entries, claimed = (
            torch.full((len(pairs) + 3,), STALE, dtype=torch.int32, device=self.impl.device) for _ in "ab"
        )
        misses = MissList(self._list(pairs), self._count(pairs), entries, claimed)
        self._claim(misses, (0, 1), step, claim)
        assert (claimed[len(pairs) :] == STALE).all() and (entries == STALE).all()
        return claimed[: len(pairs)].tolist()

    def _claim(self, wanted, layers, step, claim) -> None:
        before = [tensor.clone() for tensor in wanted[:2]]
        step = torch.tensor([step], device=self.impl.device)
        self.impl.ops.claim_blocks(wanted, self.tables.layers(*layers), step, claim, self.counters)
        assert all(torch.equal(x, y) for x, y in zip(before, wanted, strict=False))
        self.check()

    def _list(self, pairs) -> torch.Tensor:
        return torch.tensor([*pairs, 0, 1, 2], dtype=torch.int64, device=self.impl.device)

    def _count(self, pairs) -> torch.Tensor:
        return torch.tensor([len(pairs)], dtype=torch.int32, device=self.impl.device)

    def fill(self, stamps: torch.Tensor) -> None:
        """Block i of layer 0 goes to pair i, with stamp i."""
        number = torch.arange(len(stamps), dtype=torch.int32, device=self.impl.device)
        self.tables.table.view(-1)[: len(stamps)] = number
        self.tables.owner[0] = number
        self.tables.last_used[0] = stamps
        self.tables.num_free.zero_()

    def counted(self) -> tuple[int, int]:
        """Blocks that were taken, and blocks that were looked at."""
        return self.counters[Count.EVICTIONS].item(), self.counters[Count.LOOKS].item()

    def blocks_of(self, pairs, layer: int = 0) -> list[int]:
        return self.tables.table[layer].flatten()[pairs].tolist()

    def check(self) -> None:
        """Table and owners are each other's inverse; the other blocks are free, once, and carry no stamp."""
        for table, owner, last_used, free_blocks, num_free, _ in zip(*(x.cpu() for x in self.tables), strict=True):
            table, held = table.flatten(), (owner >= 0).nonzero().flatten()
            assert torch.equal(table[owner[held].long()].long(), held)
            assert (table >= 0).sum() == len(held) and table.min() >= -1
            free = free_blocks[: int(num_free)].tolist()
            assert sorted(free + held.tolist()) == list(range(len(owner)))
            assert (last_used[free] == -1).all() and (last_used[held] >= 0).all()


@pytest.fixture
def short_rounds(impl, monkeypatch) -> None:
    """Small lists and tables then take many programs and rounds."""
    if impl.name == "triton":
        from freekv_kernels import claim_pairs_triton

        for name, value in {"_NUM_PROGRAMS": 3, "_PAIRS": 4, "_CANDIDATES": 8, "_WIDE": 16}.items():
            monkeypatch.setattr(claim_pairs_triton, name, value)


def test_every_pair_gets_a_block_of_its_own(impl):
    blocks = Blocks(impl, 8)
    claimed = blocks.claim_misses([3, 50, 7])
    assert claimed == blocks.blocks_of([3, 50, 7])
    assert len({*claimed}) == 3 and min(claimed) >= 0
    assert blocks.tables.num_free.item() == 5


def test_free_blocks_go_before_victims(impl):
    blocks = Blocks(impl, 4)
    (left,) = {0, 1, 2, 3} - {*blocks.claim_misses([1, 2, 3], step=1)}
    assert blocks.claim_misses([4]) == [left]
    assert min(blocks.blocks_of([1, 2, 3, 4])) >= 0


def test_where_free_blocks_run_out_victims_serve_the_rest(impl):
    blocks = Blocks(impl, 5)
    blocks.claim([1, 2, 3], step=1)
    blocks.claim([4, 5, 6, 7])
    assert min(blocks.blocks_of([4, 5, 6, 7])) >= 0
    assert blocks.tables.num_free.item() == 0
    assert sum(block >= 0 for block in blocks.blocks_of([1, 2, 3])) == 1


def test_a_victims_owner_loses_its_entry(impl):
    blocks = Blocks(impl, 2)
    blocks.claim([1, 2], step=1)
    (block,) = blocks.claim_misses([3])
    assert blocks.tables.owner[0, block] == 3
    assert sorted(blocks.blocks_of([1, 2])) == [-1, 1 - block]


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize(
    ("old", "claim"),
    [(Claim.AS_OLD, Claim.IN_STEP), (Claim.IN_STEP, Claim.IN_STEP), (Claim.IN_STEP, Claim.BETWEEN_STEPS)],
)
def test_protected_blocks_are_never_victims_and_pairs_without_one_can_be_claimed_later(impl, old, claim):
    blocks = Blocks(impl, 30)
    protected, others = list(range(20)), list(range(20, 30))
    blocks.claim(protected, claim=old)
    blocks.claim(others, step=1)
    kept = blocks.blocks_of(protected)
    wanted = list(range(50, 63))
    claimed = blocks.claim_misses(wanted, claim=claim)
    assert blocks.blocks_of(protected) == kept
    assert sorted(claimed)[:3] == [-1] * 3 and sorted(claimed)[3] >= 0
    assert claimed == blocks.blocks_of(wanted)
    without = [pair for pair, block in zip(wanted, claimed, strict=True) if block < 0]
    assert min(blocks.claim_misses(without, step=STEP + 1)) >= 0


@pytest.mark.parametrize("hand", [0, 5, 2**31 - 1])
def test_the_hand_moves_on_so_that_victims_take_turns(impl, hand):
    blocks = Blocks(impl, 6)
    blocks.claim([0, 1, 2, 3, 4, 5], step=1)
    blocks.tables.hand.fill_(hand)
    taken = [blocks.claim_misses([10 + i], step=2)[0] for i in range(6)]
    assert sorted(taken) == [0, 1, 2, 3, 4, 5]


def test_the_oldest_that_the_hand_passes_go_first(impl):
    blocks = Blocks(impl, 64)
    stamps = torch.randperm(64).int()
    blocks.fill(stamps)
    claimed = blocks.claim_misses(list(range(70, 86)), step=100)
    assert sorted(claimed) == sorted(stamps.argsort()[:16].tolist())


def test_where_a_quarter_of_the_blocks_may_go_a_claim_takes_four_looks(impl):
    blocks = Blocks(impl, 1024, num_pairs=2000)
    blocks.fill(torch.where(torch.arange(1024) % 4 == 0, 3, 2 * STEP))
    blocks.claim_misses(list(range(1100, 1164)), claim=Claim.IN_STEP)
    assert blocks.counted() == (64, 4 * 64)


@pytest.mark.parametrize("victim", [0, 1500, 4095])
def test_however_few_blocks_may_go_no_block_is_looked_at_more_than_twice(impl, victim):
    blocks = Blocks(impl, 4096, num_pairs=5000)
    blocks.fill(torch.full((4096,), 2 * STEP))
    blocks.tables.last_used[0, victim] = 3
    assert blocks.claim_misses([4500], claim=Claim.IN_STEP) == [victim]
    num_taken, num_looks = blocks.counted()
    assert num_taken == 1 and num_looks <= 2 * 4096


def test_free_blocks_need_no_look(impl):
    blocks = Blocks(impl, 40)
    blocks.claim(list(range(40)))
    assert blocks.counted() == (0, 0)


def test_blocks_that_are_taken_from_pairs_are_counted(impl):
    blocks = Blocks(impl, 40)
    blocks.claim(list(range(30)), step=1)
    blocks.claim(list(range(50, 75)))
    num_lost = sum(block < 0 for block in blocks.blocks_of(list(range(30))))
    assert blocks.counted()[0] == num_lost == 15


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize(("victim", "hand"), [(0, 1), (25, 26), (49, 0), (7, 2**31 - 1)])
def test_the_search_goes_all_the_way_round_for_the_one_block_that_may_go(impl, victim, hand):
    blocks = Blocks(impl, 50)
    blocks.fill(torch.full((50,), 2 * STEP))
    blocks.tables.last_used[0, victim] = 3
    blocks.tables.hand.fill_(hand)
    assert sorted(blocks.claim_misses([70, 71], claim=Claim.IN_STEP)) == [-1, victim]
    assert sorted(blocks.blocks_of([70, 71])) == [-1, victim]


def test_an_empty_list_changes_nothing(impl):
    blocks = Blocks(impl, 4, layers=2)
    blocks.claim([1, 2, 3, 4], layers=(0, 1), step=1)
    before = [tensor.clone() for tensor in blocks.tables]
    blocks.claim([])
    assert blocks.claim_misses([]) == []
    no_pairs = PairList(torch.empty(0, dtype=torch.int64, device=impl.device), torch.zeros_like(blocks.tables.hand[:1]))
    step = torch.tensor([STEP], device=impl.device)
    impl.ops.claim_blocks(no_pairs, blocks.tables, step, Claim.AS_OLD, blocks.counters)
    assert all(torch.equal(x, y) for x, y in zip(before, blocks.tables, strict=True))


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize("step_of_others", [None, 1])
def test_a_pair_that_is_listed_several_times_gets_one_block_at_one_entry(impl, step_of_others):
    blocks = Blocks(impl, 20)
    if step_of_others is not None:
        blocks.claim(list(range(20)), step=step_of_others)
    pairs = [50, 60, 50, 51, 52, 60, 53, 50, 54, 50, 55, 60, 56, 57, 58]
    claimed = blocks.claim_misses(pairs)
    for pair in set(pairs):
        entries = [block for k, block in zip(pairs, claimed, strict=True) if k == pair and block >= 0]
        assert entries == blocks.blocks_of([pair])


def test_a_pair_that_has_a_block_keeps_it_and_its_stamp(impl):
    blocks = Blocks(impl, 4)
    blocks.claim([1, 2], step=1)
    held = blocks.blocks_of([1, 2])
    assert blocks.claim_misses([1, 3, 2])[::2] == [-1, -1]
    assert blocks.blocks_of([1, 2]) == held
    assert blocks.tables.last_used[0, held].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("claim", "stamp"), [(Claim.IN_STEP, 2 * STEP + 1), (Claim.BETWEEN_STEPS, 2 * STEP + 1), (Claim.AS_OLD, 2 * STEP)]
)
def test_claimed_blocks_carry_the_stamp_of_the_step(impl, claim, stamp):
    blocks = Blocks(impl, 4)
    blocks.claim([1, 2, 3], step=1)
    blocks.claim([4, 5], claim=claim)
    assert blocks.tables.last_used[0, blocks.blocks_of([4, 5])].tolist() == [stamp] * 2
    assert blocks.tables.last_used[0].max() == stamp


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize("num_held", [0, 4, 10])
def test_a_block_is_claimed_once_per_call_even_if_its_new_stamp_protects_nothing(impl, num_held):
    blocks = Blocks(impl, 10)
    blocks.claim(list(range(num_held)))
    claimed = blocks.claim_misses(list(range(50, 65)))
    assert sorted(claimed) == [-1] * 5 + list(range(10))
    assert (blocks.tables.last_used == 2 * STEP).all()
    assert sorted(blocks.claim_misses(list(range(70, 80)))) == list(range(10))  # in the next, again


@pytest.mark.usefixtures("short_rounds")
def test_layers_are_claimed_in_one_call_and_others_left_alone(impl):
    blocks = Blocks(impl, 10, layers=4)
    for layer, num_held in enumerate((0, 10, 6, 3)):
        blocks.claim(list(range(num_held)), layers=(layer, layer + 1), step=1)
    before = [tensor.clone() for tensor in blocks.tables]
    pairs = [40, 41, 42, 43, 44, 45]
    blocks.claim(pairs, layers=(1, 4), claim=Claim.BETWEEN_STEPS)
    for layer in (1, 2, 3):
        assert len({*blocks.blocks_of(pairs, layer)}) == 6 and min(blocks.blocks_of(pairs, layer)) >= 0
    assert blocks.tables.num_free.tolist() == [10, 0, 0, 1]
    assert [hand > 0 for hand in blocks.tables.hand.tolist()] == [False, True, True, False]
    assert all(torch.equal(x[0], y[0]) for x, y in zip(before, blocks.tables, strict=True))


@pytest.mark.parametrize("num_pairs", [128, 300])
def test_a_list_longer_than_one_round_is_walked_to_its_end(impl, num_pairs):
    blocks = Blocks(impl, 400, num_pairs=2000)
    blocks.claim(list(range(300)), step=1)  # 100 are free
    pairs = (400 + torch.randperm(1600)[:num_pairs]).tolist()
    claimed = blocks.claim_misses(pairs)
    assert len({*claimed}) == num_pairs and min(claimed) >= 0


@pytest.mark.usefixtures("short_rounds")
def test_any_sequence_of_claims_serves_as_many_pairs_as_it_can(impl):
    blocks = Blocks(impl, 24, num_pairs=120)
    for step in range(1, 8):
        claim = list(Claim)[int(torch.randint(len(Claim), ()))]
        missing = (torch.tensor(blocks.blocks_of(list(range(120)))) < 0).nonzero().flatten()
        pairs = missing[torch.randint(len(missing), (int(torch.randint(1, 30, ())),))].tolist()
        last_used = blocks.tables.last_used
        protected = blocks.tables.owner[0, last_used[0] >= 2 * step + claim.protect_back].long()
        kept = blocks.blocks_of(protected)
        claimed = blocks.claim_misses(pairs, step=step, claim=claim)
        assert blocks.blocks_of(protected) == kept
        assert sum(block >= 0 for block in claimed) == min(len({*pairs}), 24 - len(kept))
        assert all(block in (-1, now) for block, now in zip(claimed, blocks.blocks_of(pairs), strict=True))


def test_block_tables_may_be_larger_than_2_gib(impl):
    blocks = Blocks(impl, 4, layers=2)
    num_pairs = (1 << 29) + 64  # of one layer: the second starts past 2 GiB; what is not touched costs no memory
    table = torch.empty(2, num_pairs // 2, 2, dtype=torch.int32, device=impl.device)
    pairs = [0, 3, num_pairs - 1]
    table.view(2, -1)[:, pairs] = -1
    wanted = PairList(torch.tensor(pairs, device=impl.device), torch.tensor([3], dtype=torch.int32, device=impl.device))
    blocks.tables = blocks.tables._replace(table=table)
    step = torch.tensor([STEP], device=impl.device)
    impl.ops.claim_blocks(wanted, blocks.tables, step, Claim.BETWEEN_STEPS, blocks.counters)
    for layer in (0, 1):
        held = blocks.blocks_of(pairs, layer)
        assert blocks.tables.owner[layer, held].tolist() == pairs
