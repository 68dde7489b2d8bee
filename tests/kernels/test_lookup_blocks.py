"""Lookups give attention its blocks, mark them as used, and list exactly what is missing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from freekv_kernels import REFERENCE, Batch, BlockTables, Count, FlagList, Half, MissList, lookup_pairs

PAGES, HEADS, REQUESTS, LAYERS = 40, 2, 4, 3
STALE = 77


class Case:
    """One layer, some running requests, and what a lookup leaves behind.

    Windows are lists of logical pages, the same for both heads; logical page i of request b is host page 10 * b + i.
    """

    def __init__(
        self,
        impl: SimpleNamespace,
        windows: list[list[int]],
        num_pages: list[int],
        *,
        budget: int | list[int] = 4,
        num_pages_next: list[int] | None = None,
        entries: list[int] | None = None,
        flagged: tuple[int, ...] = (),
        step: int = 6,
        half: Half = Half.FRONT,
        width: int = 5,
        shared: bool = False,
    ) -> None:
        device, size = impl.device, len(windows)
        self.impl, self.half, self.step = impl, half, step

        def ints(x):
            return torch.tensor(x, dtype=torch.int64, device=device)

        def stale(*shape, dtype=torch.int32):
            return torch.full(shape, STALE, dtype=dtype, device=device)

        # Of one layer, as the engine stores them: a strided view. The other half holds pages that exist.
        self.windows = torch.zeros(2, LAYERS, REQUESTS + 1, HEADS, width, dtype=torch.int32, device=device)[:, 1]
        rows = torch.arange(size) % REQUESTS + 1
        index = (step + (half != Half.FRONT)) % 2
        for row, window in zip(rows.tolist(), windows, strict=True):
            self.windows[index, row] = -1
            self.windows[index, row, :, : len(window)] = ints(window).int()
        page_table = torch.arange(10, device=device) + (
            0 if shared else 10 * torch.arange(size, device=device)[:, None]
        )
        page_table = torch.cat((page_table.expand(size, 10), stale(size, 3, dtype=torch.int64)), 1)
        budgets = [budget] * size if isinstance(budget, int) else budget
        self.batch = Batch(
            rows=rows.to(device) * (ints(num_pages) > 0),
            slots=ints([0] * size),
            page_table=page_table[:, :10],
            num_pages=ints(num_pages),
            num_pages_next=ints(num_pages if num_pages_next is None else num_pages_next),
            budget_pages=ints(budgets)[:, None].repeat(1, HEADS),
            step=ints([step]),
        )
        self.table = torch.full((PAGES, HEADS), -1, dtype=torch.int32, device=device)
        self.last_used = torch.full((PAGES * HEADS,), -1, dtype=torch.int32, device=device)
        self.misses = MissList(
            stale(100, dtype=torch.int64), torch.zeros(1, dtype=torch.int32, device=device), stale(100), stale(100)
        )
        self.counters = torch.zeros(len(Count), dtype=torch.int64, device=device)
        entries = entries or [max(1, min(n, limit)) for n, limit in zip(num_pages, budgets, strict=True)]
        self.kv_indptr = ints([0, *entries]).repeat_interleave(HEADS)[1:].cumsum(0).int()
        self.kv_indices = stale(int(self.kv_indptr[-1]) + 5)
        self.is_flagged = torch.zeros(size * HEADS, dtype=torch.bool, device=device)
        self.is_flagged[list(flagged)] = True

    def hold(self, pages: list[int], stamp: int = 1) -> None:
        """Make host pages resident: block of a pair = PAGES * HEADS - 1 - pair."""
        pairs = torch.tensor(pages, device=self.table.device)[:, None] * HEADS + torch.arange(HEADS).to(
            self.table.device
        )
        self.table.view(-1)[pairs] = (PAGES * HEADS - 1 - pairs).int()
        self.last_used[PAGES * HEADS - 1 - pairs] = stamp

    def run(self, ops=None) -> Case:
        blocks = BlockTables(self.table[None], *(None,) * 5)._replace(last_used=self.last_used[None])
        of_batch = (tensor for tensor in self.batch if tensor is not None)
        unwritten = (self.windows, self.table, self.kv_indptr, self.is_flagged, *of_batch)
        before = [tensor.clone() for tensor in unwritten]
        front = ()
        if self.half == Half.FRONT:
            front = (FlagList(None, None, self.is_flagged), self.kv_indptr, self.kv_indices)
        ops = ops or self.impl.ops
        ops.lookup_blocks(self.windows, self.batch, self.half, blocks, self.misses, self.counters, *front)
        assert all(torch.equal(x, y) for x, y in zip(before, unwritten, strict=True))
        assert (self.kv_indices[self.kv_indptr[-1] :] == STALE).all()
        assert (self.misses.blocks == STALE).all() and (self.misses.pairs[self.misses.count :] == STALE).all()
        if self.half != Half.FRONT:
            assert (self.misses.entries == STALE).all() and (self.kv_indices == STALE).all()
        return self

    def row(self, row: int) -> list[int]:
        """What attention reads for a row."""
        return self.kv_indices[self.kv_indptr[row] : self.kv_indptr[row + 1]].tolist()

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Sorted (pair, entry)."""
        count = int(self.misses.count)
        return sorted(zip(self.misses.pairs[:count].tolist(), self.misses.entries[:count].tolist(), strict=True))

    @property
    def missing_keys(self) -> list[int]:
        return sorted(self.misses.pairs[: int(self.misses.count)].tolist())

    def counted(self) -> dict[str, int]:
        return {count.name: n for count, n in zip(Count, self.counters.tolist(), strict=True) if n}

    def stamp_of(self, page: int) -> list[int]:
        return self.last_used[(PAGES * HEADS - 1 - page * HEADS - torch.arange(HEADS)).to(self.table.device)].tolist()


def block_of(page: int, head: int) -> int:
    return PAGES * HEADS - 1 - (page * HEADS + head)


def test_attention_reads_the_block_of_every_entry_and_zero_where_there_is_none(impl):
    case = Case(impl, [[0, 2, 5, 6], [0, 1]], [7, 2])
    case.hold([0, 5, 6, 10, 11])
    case.run()
    for head in range(HEADS):
        assert case.row(head) == [block_of(0, head), 0, block_of(5, head), block_of(6, head)]
        assert case.row(HEADS + head) == [block_of(10, head), block_of(11, head)]


def test_each_head_has_its_own_window(impl):
    case = Case(impl, [[0, 1], [0, 1]], [7, 7], entries=[2, 2])
    case.windows[0, 2, 1, :2] = torch.tensor([3, 5])
    case.hold([0, 1, 10, 13])
    case.run()
    assert case.row(1) == [block_of(0, 1), block_of(1, 1)]
    assert case.row(2) == [block_of(10, 0), 0] and case.row(3) == [block_of(13, 1), 0]
    assert case.missing_keys == [22, 31]


def test_misses_are_listed_with_the_place_of_their_entry(impl):
    case = Case(impl, [[0, 2, 5, 6], [0, 1]], [7, 2])
    case.hold([0, 5, 11])
    case.run()
    assert case.missing == sorted([(4, 1), (5, 5), (12, 3), (13, 7), (20, 8), (21, 10)])


def test_padding_reads_block_zero_and_misses_nothing(impl):
    case = Case(impl, [[0, 1], [3], [2]], [2, 0, 0], num_pages_next=[2, 0, 0], budget=[4, 0, 0])
    case.hold([0, 1])
    case.run()
    assert [case.row(row) for row in range(2, 6)] == [[0]] * 4
    assert case.missing == [] and case.counted() == {}
    assert (case.last_used >= 12).sum() == 2 * HEADS


def test_entries_past_the_end_of_a_row_are_not_read(impl):
    case = Case(impl, [[0, 1, 2, 3], [0, 1, 2, 3]], [4, 4], entries=[4, 2])
    case.hold([0, 1, 2, 3])
    case.run()
    assert case.missing_keys == [20, 21, 22, 23]
    assert [len(case.row(row)) for row in range(4)] == [4, 4, 2, 2]
    case = Case(impl, [[0, 1, 2, 3]], [4], budget=3, num_pages_next=[5], half=Half.BACK).run()
    assert case.missing_keys == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("half", Half)
@pytest.mark.parametrize("step", [6, 7])
def test_each_read_has_its_half_of_the_windows_and_its_stamp(impl, half, step):
    case = Case(impl, [[1, 3]], [9], step=step, half=half, num_pages_next=[9], entries=[2])
    case.hold([0, 1, 2, 3])
    case.run()
    stamp = 2 * step + (half != Half.FRONT)
    assert case.stamp_of(1) == case.stamp_of(3) == [stamp] * HEADS
    assert case.stamp_of(0) == case.stamp_of(2) == [1] * HEADS


def test_blocks_that_the_next_step_reads_again_are_stamped_for_it(impl):
    case = Case(impl, [[0, 1], [0, 1, 2, 3], [1, 2, 3, 4]], [2, 4, 5], num_pages_next=[2, 5, 5])
    case.hold([0, 1, 10, 13, 21, 24])
    case.run()
    assert case.stamp_of(0) == case.stamp_of(1) == [13] * HEADS
    assert case.stamp_of(10) == case.stamp_of(24) == [12] * HEADS


@pytest.mark.parametrize("first", [0, 1])
def test_the_later_of_two_stamps_stays(impl, first):
    pages = [[0, 1], [0, 1, 2, 3]]
    order = [first, 1 - first]
    case = Case(impl, [pages[i] for i in order], [(2, 5)[i] for i in order], shared=True)
    case.hold([0, 1, 2, 3])
    case.run()
    assert case.stamp_of(0) == case.stamp_of(1) == [13] * HEADS
    assert case.stamp_of(2) == case.stamp_of(3) == [12] * HEADS
    case = Case(impl, [[0, 1, 2, 3]], [5])
    case.hold([0, 1], stamp=13)
    case.run()
    assert case.stamp_of(0) == [13] * HEADS


def test_two_requests_that_miss_the_same_page_list_it_twice(impl):
    case = Case(impl, [[0], [0]], [1, 1], shared=True).run()
    assert case.missing == [(0, 0), (0, 2), (1, 1), (1, 3)]


def test_pages_that_do_not_exist_yet_are_no_entries(impl):
    case = Case(impl, [[0, 4, 5, -1]], [5], half=Half.BACK, num_pages_next=[6])
    case.hold([0])
    case.run()
    assert case.missing_keys == [8, 9]
    assert case.counted() == {"HITS": 2, "MISSES": 2}


def test_the_back_windows_of_requests_within_their_budget_are_not_looked_up(impl):
    case = Case(impl, [[0, 1, 2, 3], [0, 1, 2, 3]], [4, 4], half=Half.BACK, num_pages_next=[4, 5])
    case.hold([0, 10])
    case.run()
    assert case.missing_keys == [22, 23, 24, 25, 26, 27]
    assert case.stamp_of(0) == [1] * HEADS and case.stamp_of(10) == [13] * HEADS
    nobody = Case(impl, [[0, 1]], [2], half=Half.BACK).run()
    assert nobody.missing == [] and nobody.counted() == {}


def test_first_windows_are_looked_up_within_the_budget_and_over_it(impl):
    case = Case(impl, [[0, 1], [0, 2, 3, 4]], [2, 5], half=Half.BOTH)
    case.hold([0, 12])
    case.run()
    assert case.missing_keys == [2, 3, 20, 21, 26, 27, 28, 29]
    assert case.counted() == {"HITS": 4, "MISSES": 8}


def test_flagged_rows_count_hits_and_misses_and_the_others_demand_misses(impl):
    case = Case(impl, [[0, 2, 5, 6], [0, 2, 5, 6]], [7, 7], flagged=(1,))
    case.hold([0, 2, 5, 10])
    case.run()
    assert case.counted() == {"HITS": 3, "MISSES": 1, "DEMAND_MISSES": 1 + 2 * 3}
    case.misses.count.zero_()
    case.run()
    assert case.counted() == {"HITS": 6, "MISSES": 2, "DEMAND_MISSES": 14}


@pytest.mark.parametrize("width", [1, 5, 8, 130])
@pytest.mark.parametrize("half", Half)
def test_the_kernel_and_the_reference_agree_on_random_windows(impl, width, half):
    size, num_pages = 4, torch.randint(1, 11, (4,)).tolist()
    budgets = torch.randint(1, width + 1, (size,)).tolist()
    windows = [torch.randperm(12)[: min(width, 12)].tolist() for _ in range(size)]
    flagged = tuple(torch.randperm(size * HEADS)[:3].tolist())
    held = torch.randperm(PAGES)[: PAGES // 2].tolist()
    cases = []
    for ops in (impl.ops, REFERENCE):
        case = Case(impl, windows, num_pages, budget=budgets, half=half, flagged=flagged, width=width)
        case.hold(held)
        cases.append(case.run(ops))
    ours, reference = cases
    assert ours.missing == reference.missing and ours.counted() == reference.counted()
    assert torch.equal(ours.kv_indices, reference.kv_indices)
    assert torch.equal(ours.last_used, reference.last_used)


@pytest.mark.parametrize("held", [[0, 1, 2, 10, 11], [0, 1, 10, 11], [0, 1, 2, 3, 10]], ids=str)
def test_keys_listed_once_for_all_layers_find_what_windows_find_or_nothing(held):
    on_cpu = SimpleNamespace(ops=REFERENCE, device="cpu")
    by_windows, by_pairs = (Case(on_cpu, [[0, 1, 2], [0, 1]], [3, 2]) for _ in range(2))
    for case in (by_windows, by_pairs):
        case.hold(held)
    by_windows.run()
    is_complete = by_windows.missing == []
    pairs = [page * HEADS + h for pages in ([0, 1, 2], [10, 11]) for h in range(HEADS) for page in pages]
    blocks = BlockTables(by_pairs.table, *(None,) * 5)._replace(last_used=by_pairs.last_used)
    untouched = by_pairs.last_used.clone()
    assert lookup_pairs(torch.tensor(pairs), blocks, by_pairs.batch.step, by_pairs.kv_indices) == is_complete
    assert torch.equal(by_pairs.last_used, by_windows.last_used if is_complete else untouched)
    assert torch.equal(by_pairs.kv_indices, by_windows.kv_indices) or not is_complete
    assert is_complete == (2 in held and 11 in held)
