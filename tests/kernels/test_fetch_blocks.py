"""A fetch does what lookup, claim and recall do one after the other, however its rows and their programs meet.

Which victim goes, and which pair gets which block, is up to the implementation; as the pages of a window are, and as
is counted what became of them, but for the looks, the two agree.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from freekv_kernels import REFERENCE, BlockTables, Claim, Count, FlagList, Half, MissList, PageStore
from tests.support.op_tables import batch_of

HEADS, LAYERS, PAGE, DIM, STEP = 2, 2, 8, 4, 6
STALE = 77


class Layer:
    """One layer, the second of its store: windows of a batch, blocks some of which hold pages, and a fetch.

    Parameters
    ----------
    windows : list of lists of int
        Logical pages of each request, the same for its heads.
    first_pages : list of int
        Host page of each request's page 0; the following pages follow.
    """

    def __init__(
        self,
        impl: SimpleNamespace,
        windows: list[list[int]],
        first_pages: list[int],
        *,
        half: Half = Half.FRONT,
        num_blocks: int = 40,
        num_pages: int = 10,
        budget: int = 4,
        num_host_pages: int = 40,
        flagged: tuple[int, ...] = (),
    ) -> None:
        self.half, self.device, size = half, impl.device, len(windows)
        width = max(map(len, windows)) + 1

        def ints(*shape, value=-1, dtype=torch.int32):
            return torch.full(shape, value, dtype=dtype, device=impl.device)

        self.windows = ints(2, size + 1, HEADS, width, value=0)
        (index,) = {Half.FRONT: [0], Half.BACK: [1], Half.BOTH: [1]}[half]  # the step is even
        for row, window in enumerate(windows, start=1):
            self.windows[index, row, :, : len(window)] = torch.tensor(window, dtype=torch.int32, device=impl.device)
        page_table = torch.tensor(first_pages, device=impl.device)[:, None] + torch.arange(10, device=impl.device)
        self.batch = batch_of(page_table, [num_pages] * size, [budget] * size, step=STEP)
        self.host_kv = impl.host(torch.randn(num_host_pages, LAYERS, HEADS, 2, PAGE, DIM))
        self.block_kv = torch.full((num_blocks, 2, PAGE, DIM), torch.nan, device=impl.device)
        self.blocks = BlockTables(
            table=ints(1, num_host_pages, HEADS),
            owner=ints(1, num_blocks),
            last_used=ints(1, num_blocks),
            free_blocks=torch.arange(num_blocks, dtype=torch.int32, device=impl.device)[None].clone(),
            num_free=ints(1, value=num_blocks),
            hand=ints(1, value=5),
        )
        num_entries = size * HEADS * width
        self.misses = MissList(
            ints(num_entries, value=STALE, dtype=torch.int64),
            ints(1, value=0),
            ints(num_entries, value=STALE),
            ints(num_entries, value=STALE),
            ints(3, value=0),
        )
        self.counters = ints(len(Count), value=0, dtype=torch.int64)
        self.front = ()
        if half == Half.FRONT:
            is_flagged = torch.zeros(size * HEADS, dtype=torch.bool, device=impl.device)
            is_flagged[list(flagged)] = True
            kv_indptr = budget * torch.arange(size * HEADS + 1, dtype=torch.int32, device=impl.device)
            self.front = (FlagList(None, None, is_flagged), kv_indptr, ints(num_entries, value=STALE))

    def hold(self, pairs: list[int] | torch.Tensor, stamp: int | torch.Tensor = 1) -> list[int]:
        """Make pairs resident, in the next free blocks; these."""
        pairs = torch.as_tensor(pairs, device=self.device)
        first = int((self.blocks.owner >= 0).sum())
        held = torch.arange(first, first + len(pairs), device=self.device)
        self.blocks.table.view(-1)[pairs], self.blocks.owner[0, held] = held.int(), pairs.int()
        self.blocks.last_used[0, held] = torch.as_tensor(stamp, device=self.device).int().expand(len(held))
        self.block_kv[held] = self._records(pairs)
        num_free = self.blocks.owner.shape[1] - first - len(pairs)
        self.blocks.free_blocks[0, :num_free] = torch.arange(first + len(pairs), first + len(pairs) + num_free)
        self.blocks.num_free.fill_(num_free)
        return held.tolist()

    def fetch(self, ops) -> Layer:
        store = PageStore(self.host_kv[:, 1], None, self.block_kv, self.blocks.table[0])
        unwritten = (self.windows, self.host_kv, *self.batch[:-1])
        before = [tensor.clone() for tensor in unwritten]
        ops.fetch_blocks(
            self.windows, self.batch, self.half, store, self.blocks, self.misses, self.counters, *self.front
        )
        assert all(torch.equal(x, y) for x, y in zip(before, unwritten, strict=True))
        self.check()
        return self

    def in_turn(self) -> Layer:
        """What the references of the three ops do."""
        store, claim = PageStore(self.host_kv[:, 1], None, self.block_kv, self.blocks.table[0]), Claim.IN_STEP
        if self.half == Half.BOTH:
            claim = Claim.BETWEEN_STEPS
        REFERENCE.lookup_blocks(
            self.windows, self.batch, self.half, self.blocks, self.misses, self.counters, *self.front
        )
        REFERENCE.claim_blocks(self.misses, self.blocks, self.batch.step, claim, self.counters)
        REFERENCE.recall_blocks(store, self.misses, self.counters, *self.front[2:])
        return self

    def check(self) -> None:
        """Table and owners are each other's inverse, and what has a block is in it, bit for bit."""
        table, owner = self.blocks.table.view(-1), self.blocks.owner[0].long()
        held = (owner >= 0).nonzero().flatten()
        assert torch.equal(table[owner[held]].long(), held)
        assert (table >= 0).sum() == len(held) and table.min() >= -1
        free = self.blocks.free_blocks[0, : int(self.blocks.num_free)].tolist()
        assert sorted(free + held.tolist()) == list(range(len(owner)))
        assert (self.blocks.last_used[0, free] == -1).all()
        assert torch.equal(self.block_kv[held], self._records(owner[held]))

    def _records(self, pairs: torch.Tensor) -> torch.Tensor:
        return self.host_kv[:, 1].flatten(0, 1)[pairs.cpu()].to(self.device)

    def pairs(self) -> torch.Tensor:
        """Of each row's entries: int64 ``[num_rows, budget]``."""
        index = int(self.half != Half.FRONT)
        budget = int(self.batch.budget_pages[0, 0])
        window = self.windows[index, self.batch.rows, :, :budget].long()
        pages = self.batch.page_table.gather(1, window.flatten(1)).view_as(window)
        return (pages * HEADS + torch.arange(HEADS, device=self.device)[:, None]).flatten(0, 1)

    def blocks_of(self, pairs) -> list[int]:
        return self.blocks.table.view(-1)[torch.as_tensor(pairs, device=self.device)].tolist()

    def read(self) -> torch.Tensor:
        """The blocks that attention reads: int32 ``[num_rows, budget]``."""
        return self.front[2][: int(self.front[1][-1])].view_as(self.pairs())

    def counted(self, *others: Count) -> dict[str, int]:
        """But for the looks, and others."""
        left_out = (Count.LOOKS, *others)
        counts = zip(Count, self.counters.tolist(), strict=True)
        return {count.name: n for count, n in counts if n and count not in left_out}


@pytest.fixture
def short_rounds(impl, monkeypatch) -> None:
    """Small lists and tables then take many programs and rounds."""
    if impl.name == "triton":
        from freekv_kernels import claim_pairs_triton, recall_blocks_triton

        for name, value in {"_NUM_PROGRAMS": 3, "_PAIRS": 4, "_CANDIDATES": 8, "_WIDE": 16}.items():
            monkeypatch.setattr(claim_pairs_triton, name, value)
        monkeypatch.setattr(recall_blocks_triton, "_NUM_PROGRAMS", 2)


@pytest.mark.parametrize("half", Half)
@pytest.mark.parametrize("num_held", [0, 3])
def test_every_page_of_a_window_has_a_block_that_holds_it(impl, half, num_held):
    layer = Layer(impl, [[0, 2, 5, 9], [0, 1, 3, 9]], [0, 20], half=half, budget=4)
    held = layer.pairs()[:, :num_held].flatten()
    kept = layer.hold(held)
    layer.batch.num_pages_next.fill_(11)
    layer.fetch(impl.ops)
    assert min(layer.blocks_of(layer.pairs().flatten())) >= 0
    assert layer.blocks_of(held) == kept
    if half == Half.FRONT:
        assert layer.read().flatten().tolist() == layer.blocks_of(layer.pairs().flatten())
        assert (layer.front[2][layer.read().numel() :] == STALE).all()


def test_a_row_keeps_the_pages_that_it_finds_whatever_the_rows_before_it_claim(impl):
    """Older stamps than those of all other blocks make them the first to go, if they were not looked up before."""
    layer = Layer(impl, [[0, 1, 2, 3], [4, 5, 6, 7]], [0, 0], half=Half.BACK, num_blocks=24)
    layer.batch.num_pages_next.fill_(11)
    found = layer.pairs()[HEADS:].flatten()
    kept = layer.hold(found, stamp=0)
    layer.hold(torch.arange(40, 56), stamp=3)
    layer.fetch(impl.ops)
    assert layer.blocks_of(found) == kept
    assert min(layer.blocks_of(layer.pairs().flatten())) >= 0
    assert layer.counted() == {"HITS": 8, "MISSES": 8, "RECALLS": 8, "EVICTIONS": 8}


def test_a_page_that_several_rows_miss_is_copied_once_and_read_by_all(impl):
    layer = Layer(impl, [[0, 1, 2, 3]] * 5, [0] * 5, flagged=(0, 1))
    layer.fetch(impl.ops)
    assert layer.counted() == {"MISSES": 8, "DEMAND_MISSES": 32, "RECALLS": 8}
    assert layer.read().flatten().tolist() == layer.blocks_of(layer.pairs().flatten())
    assert len(set(layer.read().flatten().tolist())) == 8


def test_free_blocks_go_first_and_victims_serve_the_rest(impl):
    layer = Layer(impl, [[0, 1, 2, 3], [5, 6, 7, 8]], [0, 10], num_blocks=20)
    others = torch.arange(60, 77)
    layer.hold(others, stamp=1)
    layer.fetch(impl.ops)
    assert layer.counted() == {"DEMAND_MISSES": 16, "RECALLS": 16, "EVICTIONS": 13}
    assert sum(block < 0 for block in layer.blocks_of(others)) == 13
    assert layer.blocks.num_free.item() == 0


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize("num_victims", [0, 1, 6])
def test_where_blocks_run_out_entries_read_block_zero_and_are_counted(impl, num_victims):
    layer = Layer(impl, [[0, 1, 2, 3], [0, 1, 6, 7]], [0, 0], num_blocks=20)
    protected = torch.arange(40, 58 - num_victims)
    kept = layer.hold(protected, stamp=2 * STEP)
    layer.hold(torch.arange(58 - num_victims, 58), stamp=2 * STEP - 1)
    layer.fetch(impl.ops)
    assert layer.blocks_of(protected) == kept
    blocks = layer.blocks_of(layer.pairs().flatten())
    without = sum(block < 0 for block in blocks)
    assert len({block for block in blocks if block >= 0}) == num_victims + 2
    assert layer.read().flatten().tolist() == [max(block, 0) for block in blocks]
    counted = {"DEMAND_MISSES": 16, "RECALLS": num_victims + 2, "EVICTIONS": num_victims, "ABSENT_PAGES": without}
    assert layer.counted() == {name: n for name, n in counted.items() if n}


@pytest.mark.parametrize(("half", "is_served"), [(Half.FRONT, False), (Half.BACK, False), (Half.BOTH, True)])
def test_only_first_windows_take_blocks_that_the_step_reads(impl, half, is_served):
    layer = Layer(impl, [[0, 1, 2, 3]], [0], half=half, num_blocks=8)
    layer.batch.num_pages_next.fill_(11)
    layer.hold(torch.arange(40, 48), stamp=2 * STEP)
    layer.fetch(impl.ops)
    assert [block >= 0 for block in layer.blocks_of(layer.pairs().flatten())] == [is_served] * 8


@pytest.mark.parametrize("half", Half)
def test_what_is_fetched_is_stamped_for_the_next_step(impl, half):
    layer = Layer(impl, [[0, 1, 2, 3]], [0], half=half)
    layer.batch.num_pages_next.fill_(11)
    layer.fetch(impl.ops)
    stamps = layer.blocks.last_used[0, layer.blocks_of(layer.pairs().flatten())]
    assert (stamps == 2 * STEP + 1).all()


def test_padding_and_rows_that_read_all_their_pages_again_fetch_nothing_for_the_next_step(impl):
    layer = Layer(impl, [[0, 1, 2, 3]] * 3, [0, 10, 20], half=Half.BACK)
    layer.batch.num_pages.copy_(torch.tensor([4, 0, 9]))
    layer.batch.num_pages_next.copy_(torch.tensor([4, 0, 9]))
    layer.batch.rows[1], layer.batch.budget_pages[1] = 0, 0
    layer.fetch(impl.ops)
    assert sorted(layer.misses.pairs[: int(layer.misses.count)].tolist()) == list(range(40, 48))
    assert layer.counted() == {"MISSES": 8, "RECALLS": 8}


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize("half", Half)
@pytest.mark.parametrize("num_blocks", [30, 90], ids="{}-blocks".format)
def test_whatever_rows_share_and_blocks_hold_a_fetch_is_lookup_claim_and_recall(impl, half, num_blocks):
    for _ in range(20 if impl.device == "cuda" else 3):
        windows = [torch.randperm(10)[:5].tolist() for _ in range(6)]
        first_pages = [int(torch.randint(3, ())) * 10 for _ in windows]
        flagged = tuple(torch.randperm(len(windows) * HEADS)[:5].tolist())
        layer = Layer(impl, windows, first_pages, half=half, num_blocks=num_blocks, budget=5, flagged=flagged)
        layer.batch.num_pages_next.copy_(torch.randint(4, 12, (len(windows),)))
        held = torch.randperm(80)[: int(torch.randint(num_blocks + 1, ())) if num_blocks < 80 else 40]
        layer.hold(held, 2 * STEP - torch.randint(-1, 6, (len(held),)))
        on_cpu = SimpleNamespace(device="cpu", host=lambda tensor: tensor)
        expected = Layer(on_cpu, windows, first_pages, half=half, num_blocks=num_blocks, budget=5, flagged=flagged)
        _assign(expected, layer)
        expected.in_turn()
        layer.fetch(impl.ops)
        # Which pairs go without a block is left to chance, and so are the entries that want them.
        assert layer.counted(Count.ABSENT_PAGES) == expected.counted(Count.ABSENT_PAGES)
        missing = [sorted(x.misses.pairs[: int(x.misses.count)].tolist()) for x in (layer, expected)]
        assert missing[0] == missing[1]
        served, expected_served = ({p for p in missing[0] if x.blocks_of([p])[0] >= 0} for x in (layer, expected))
        assert len(served) == len(expected_served)
        assert layer.blocks.num_free.item() == expected.blocks.num_free.item()
        if half == Half.FRONT:
            blocks = torch.tensor(layer.blocks_of(layer.pairs().flatten()))
            assert torch.equal(layer.read().flatten().cpu().long(), blocks.clamp(min=0))
            assert layer.counters[Count.ABSENT_PAGES] == (blocks < 0).sum()


def _assign(layer: Layer, other: Layer) -> None:
    """Give a layer on the CPU the values of another."""
    for name in ("windows", "batch", "host_kv", "block_kv", "blocks"):
        setattr(layer, name, _to_cpu(getattr(other, name)))


def _to_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    return type(value)(*map(_to_cpu, value)) if isinstance(value, tuple) else value


def test_where_nothing_is_missing_only_stamps_change(impl):
    layer = Layer(impl, [[0, 1, 2, 3]], [0])
    kept = layer.hold(layer.pairs().flatten())
    unwritten = (*layer.blocks._replace(last_used=layer.blocks.owner), layer.misses.count)
    before = [tensor.clone() for tensor in unwritten]
    layer.fetch(impl.ops)
    assert all(torch.equal(x, y) for x, y in zip(before, unwritten, strict=True))
    assert (layer.blocks.last_used[0, kept] >= 2 * STEP).all() and layer.counted() == {}
    assert layer.read().flatten().tolist() == kept
