"""Recalls are exact copies of whole records, once per pair, and leave no window entry without a block."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from freekv_kernels import Batch, BlockTables, Claim, Count, FlagList, Half, MissList, PageStore, PairList

LAYERS, HEADS, PAGE = 3, 2, 8


def make_misses(
    impl: SimpleNamespace, pairs: list[int], blocks: list[int], entries: list[int] | None = None
) -> MissList:
    """A list whose capacity is larger than what it holds; the rest would be copied, were it read."""

    def padded(values: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([*values, 0, 0, 0], dtype=dtype, device=impl.device)

    count = torch.tensor([len(pairs)], dtype=torch.int32, device=impl.device)
    entries = padded(entries or [0] * len(pairs), torch.int32)
    progress = torch.zeros(3, dtype=torch.int32, device=impl.device)
    return MissList(padded(pairs, torch.int64), count, entries, padded(blocks, torch.int32), progress)


class Case:
    """A host store of random values, and blocks that hold none of them."""

    def __init__(self, impl: SimpleNamespace, pages: int = 6, dim: int = 4, dtype: torch.dtype = torch.float32) -> None:
        self.impl = impl
        self.host_kv = impl.host(torch.randn(pages, LAYERS, HEADS, 2, PAGE, dim).to(dtype))
        self.block_kv = torch.zeros(12, 2, PAGE, dim, dtype=dtype, device=impl.device)
        self.table = torch.full((pages, HEADS), -1, dtype=torch.int32, device=impl.device)
        self.counters = torch.zeros(len(Count), dtype=torch.int64, device=impl.device)

    def recall(self, layer: int, misses: MissList, kv_indices: torch.Tensor | None = None) -> None:
        unwritten = (self.host_kv, self.table, *misses)
        before = [tensor.clone() for tensor in unwritten]
        store = PageStore(self.host_kv[:, layer], None, self.block_kv, self.table)
        self.impl.ops.recall_blocks(store, misses, self.counters, kv_indices)
        assert all(torch.equal(x, y) for x, y in zip(before, unwritten, strict=True))

    def counted(self) -> dict[str, int]:
        return {count.name: n for count, n in zip(Count, self.counters.tolist(), strict=True) if n}


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(64, torch.float16), (96, torch.bfloat16), (128, torch.bfloat16), (256, torch.float32), (4, torch.float32)],
)
def test_recall_copies_whole_records_and_nothing_else(impl, layer, dim, dtype):
    case = Case(impl, dim=dim, dtype=dtype)
    case.recall(layer, make_misses(impl, [3 * HEADS + 1, 5 * HEADS, 0], [4, 1, 11]))
    expected = torch.zeros_like(case.block_kv, device="cpu")
    expected[4], expected[1], expected[11] = (case.host_kv[page, layer, h] for page, h in ((3, 1), (5, 0), (0, 0)))
    assert torch.equal(case.block_kv.cpu(), expected)
    assert case.counted() == {"RECALLS": 3}


def test_entries_without_a_block_to_fill_are_not_copied(impl):
    case = Case(impl)
    case.recall(1, make_misses(impl, [2, 2, 5, 7], [3, -1, -1, -1]))
    assert torch.equal(case.block_kv[3].cpu(), case.host_kv[1, 1, 0])
    assert case.block_kv.abs().sum((1, 2, 3)).count_nonzero() == 1
    assert case.counted() == {"RECALLS": 1}


def test_an_empty_list_changes_nothing(impl):
    case = Case(impl)
    kv_indices = torch.full((4,), 77, dtype=torch.int32, device=impl.device)
    case.recall(0, make_misses(impl, [], []), kv_indices)
    assert case.block_kv.count_nonzero() == 0 and (kv_indices == 77).all() and case.counted() == {}


@pytest.mark.parametrize("num_missing", [1, 70, 200])
def test_every_miss_of_a_long_list_is_copied(impl, num_missing):
    case = Case(impl, pages=110)
    case.block_kv = torch.zeros(220, 2, PAGE, 4, device=impl.device)
    pairs, blocks = torch.randperm(220)[:num_missing], torch.randperm(220)[:num_missing]
    case.recall(1, make_misses(impl, pairs.tolist(), blocks.tolist()))
    expected = torch.zeros_like(case.block_kv, device="cpu")
    expected[blocks] = case.host_kv[:, 1].flatten(0, 1)[pairs].cpu()
    assert torch.equal(case.block_kv.cpu(), expected)
    assert case.counted() == {"RECALLS": num_missing}


def test_the_window_is_completed_at_every_entry_of_a_pair_and_absent_pages_are_counted(impl):
    case = Case(impl)
    case.table[1, 0], case.table[2, 1] = 3, 8
    kv_indices = torch.full((10,), 77, dtype=torch.int32, device=impl.device)
    case.recall(1, make_misses(impl, [2, 2, 5, 7, 7], [-1, 3, -1, -1, -1], [9, 0, 4, 5, 2]), kv_indices)
    assert kv_indices.tolist() == [3, 77, 0, 77, 8, 0, 77, 77, 77, 3]
    assert case.counted() == {"RECALLS": 1, "ABSENT_PAGES": 2}
    case.recall(1, make_misses(impl, [2, 2, 5, 7, 7], [-1, 3, -1, -1, -1]))
    assert case.counted() == {"RECALLS": 2, "ABSENT_PAGES": 2}


def test_a_long_window_is_completed(impl, monkeypatch):
    if impl.name == "triton":
        from freekv_kernels import recall_blocks_triton

        monkeypatch.setattr(recall_blocks_triton, "_NUM_PROGRAMS", 1)  # in several rounds
    case = Case(impl, pages=110)
    case.table.copy_(torch.randperm(220).view(110, HEADS))
    case.table[13, 1] = -1
    pairs, entries = torch.randint(220, (300,)), torch.randperm(400)[:300]
    pairs[::50] = 13 * HEADS + 1
    kv_indices = torch.full((400,), 777, dtype=torch.int32, device=impl.device)
    case.recall(1, make_misses(impl, pairs.tolist(), [-1] * 300, entries.tolist()), kv_indices)
    expected = torch.full((400,), 777, dtype=torch.int32)
    expected[entries] = case.table.cpu().view(-1)[pairs].clamp(min=0)
    assert torch.equal(kv_indices.cpu(), expected)
    assert case.counted() == {"ABSENT_PAGES": int((pairs == 13 * HEADS + 1).sum())}


def test_host_store_and_blocks_may_be_larger_than_2_gi_elements(impl):
    case = Case(impl)
    pages = (1 << 31) // (LAYERS * HEADS * 2 * PAGE * 64) + 2  # what is not touched costs no memory
    case.host_kv = torch.empty(pages, LAYERS, HEADS, 2, PAGE, 64, dtype=torch.int8, pin_memory=impl.device == "cuda")
    num_blocks = (1 << 31) // (2 * PAGE * 64) + 2
    case.block_kv = torch.empty(num_blocks, 2, PAGE, 64, dtype=torch.int8, device=impl.device)
    record = torch.arange(2 * PAGE * 64).view(2, PAGE, 64).to(torch.int8)
    case.host_kv[-1, 2, 1] = record
    misses = make_misses(impl, [pages * HEADS - 1], [num_blocks - 1])
    impl.ops.recall_blocks(PageStore(case.host_kv[:, 2], None, case.block_kv, case.table), misses, case.counters)
    assert torch.equal(case.block_kv[-1].cpu(), record)


class Steps:
    """Decode steps on one layer of random windows, with just the blocks that the requests are admitted for."""

    PAGES, REQUESTS, WIDTH = 30, 3, 4

    def __init__(self, impl: SimpleNamespace) -> None:
        self.impl, device = impl, impl.device
        num_rows = self.REQUESTS * HEADS
        num_blocks, num_entries = 2 * num_rows * self.WIDTH, num_rows * self.WIDTH

        def ints(*shape, value=0, dtype=torch.int32):
            return torch.full(shape, value, dtype=dtype, device=device)

        self.host_kv = impl.host(torch.randn(self.PAGES, LAYERS, HEADS, 2, PAGE, 4))
        self.block_kv = torch.zeros(num_blocks, 2, PAGE, 4, device=device)
        self.all_blocks = BlockTables(
            table=ints(1, self.PAGES, HEADS, value=-1),
            owner=ints(1, num_blocks, value=-1),
            last_used=ints(1, num_blocks, value=-1),
            free_blocks=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
            num_free=ints(1, value=num_blocks),
            hand=ints(1),
        )
        self.blocks = BlockTables(*(tensor[0] for tensor in self.all_blocks))
        self.windows = ints(2, self.REQUESTS + 1, HEADS, self.WIDTH) + torch.arange(self.WIDTH, device=device).int()
        self.batch = Batch(
            rows=torch.arange(1, self.REQUESTS + 1, device=device),
            slots=ints(self.REQUESTS, dtype=torch.int64),
            page_table=ints(self.REQUESTS, 10, dtype=torch.int64),
            num_pages=ints(self.REQUESTS, value=10, dtype=torch.int64),
            num_pages_next=ints(self.REQUESTS, value=10, dtype=torch.int64),
            budget_pages=ints(self.REQUESTS, HEADS, value=self.WIDTH, dtype=torch.int64),
            step=ints(1, dtype=torch.int64),
        )
        self.counters = ints(len(Count), dtype=torch.int64)
        self.kv_indptr = torch.arange(0, num_entries + 1, self.WIDTH, dtype=torch.int32, device=device)
        self.kv_indices = ints(num_entries)
        self.num_entries = num_entries

    def make_resident(self, half: Half) -> None:
        """What the engine does with the windows of a step."""
        device, ops = self.impl.device, self.impl.ops
        fields = [torch.full((self.num_entries,), 77, dtype=torch.int32, device=device) for _ in range(3)]
        misses = MissList(fields[0].long(), torch.zeros(1, dtype=torch.int32, device=device), *fields[1:])
        front = ()
        if half == Half.FRONT:
            is_flagged = torch.rand(self.REQUESTS * HEADS, device=device) < 0.5
            front = (FlagList(None, None, is_flagged), self.kv_indptr, self.kv_indices)
        ops.lookup_blocks(self.windows, self.batch, half, self.all_blocks, misses, self.counters, *front)
        claim = Claim.BETWEEN_STEPS if half == Half.BOTH else Claim.IN_STEP
        ops.claim_blocks(misses, self.all_blocks, self.batch.step, claim, self.counters)
        store = PageStore(self.host_kv[:, 1], None, self.block_kv, self.blocks.table)
        ops.recall_blocks(store, misses, self.counters, *front[2:])
        self.check()

    def select(self, half: int) -> None:
        """Some rows want other pages; no row wants one twice."""
        for window in self.windows[half, 1:].flatten(0, 1):
            if torch.rand(()) < 0.7:
                window.copy_(torch.randperm(10)[: self.WIDTH])

    def rewrite_pages(self, pages: list[int]) -> None:
        """Pages get a new owner, whose tokens stay resident where blocks are to be had."""
        ops, device = self.impl.ops, self.impl.device
        pairs = torch.tensor([page * HEADS + head for page in pages for head in range(HEADS)], device=device)
        wanted = PairList(pairs, torch.tensor([len(pairs)], dtype=torch.int32, device=device))
        ops.forget_blocks(wanted, self.all_blocks)
        self.check()
        self.host_kv[pages] = torch.randn(len(pages), LAYERS, HEADS, 2, PAGE, 4)
        ops.claim_blocks(wanted, self.all_blocks, self.batch.step, Claim.AS_OLD, self.counters)
        resident = pairs[self.blocks.table.view(-1)[pairs] >= 0]
        records = self.host_kv[:, 1].flatten(0, 1)[resident.cpu()]
        self.block_kv[self.blocks.table.view(-1)[resident].long()] = records.to(device)
        self.check()

    def check(self) -> None:
        """Invariants of the tables, and every resident block is a copy of its page."""
        table, owner, last_used = (
            self.blocks.table.flatten().cpu(),
            self.blocks.owner.cpu(),
            self.blocks.last_used.cpu(),
        )
        held = (owner >= 0).nonzero().flatten()
        assert torch.equal(table[owner[held].long()].long(), held) and (table >= 0).sum() == len(held)
        free = self.blocks.free_blocks[: self.blocks.num_free].tolist()
        assert sorted(free + held.tolist()) == list(range(len(owner)))
        assert (last_used[free] == -1).all() and last_used.max() <= 2 * int(self.batch.step) + 1
        assert torch.equal(self.block_kv.cpu()[held], self.host_kv[:, 1].flatten(0, 1)[owner[held].long()])


@pytest.mark.parametrize("shared", [False, True])
def test_attention_never_misses_a_page_whatever_steps_and_prompts_follow_each_other(impl, shared):
    steps = Steps(impl)
    for step in range(4):
        half = step % 2
        rows = torch.arange(10) if shared else 10 * torch.arange(steps.REQUESTS)[:, None] + torch.arange(10)
        steps.batch.page_table.copy_(rows.expand(steps.REQUESTS, 10))
        steps.batch.step.fill_(step)
        steps.select(half)  # correction
        steps.make_resident(Half.FRONT)
        entries = steps.windows[half, 1:].long()
        pages = steps.batch.page_table[:, None].expand(-1, HEADS, -1).gather(2, entries)
        for head in range(HEADS):
            read = steps.kv_indices.view(steps.REQUESTS, HEADS, -1)[:, head].long()
            assert torch.equal(steps.block_kv[read].cpu(), steps.host_kv[pages[:, head].cpu(), 1, head])
        steps.select(1 - half)
        steps.make_resident(Half.BACK)
        wanted = steps.batch.page_table[:, None].expand(-1, HEADS, -1).gather(2, steps.windows[1 - half, 1:].long())
        steps.rewrite_pages(sorted(set(range(steps.PAGES)) - set(wanted.flatten().tolist()))[: 4 + step])
        steps.make_resident(Half.BOTH)
    assert steps.counters[Count.ABSENT_PAGES] == 0
    assert steps.counters[Count.RECALLS] > 0
