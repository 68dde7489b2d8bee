"""The protocol of the kernel of fetch_blocks, whatever order its programs' memory operations have.

A model of `fetch_blocks_triton` in plain Python, because an interpreter runs one program after the other. With the
tickets or a wait left out the same checks fail.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.support.interleavings import WAITING, Deadlock, Memory, Program, run_interleaved

CLAIMING, STEP, NUM_PAIRS, TRIALS = -2, 50, 60, 300
PAIRS, SPAN, MOST = 2, 4, 2  # in hand at once, of a claim


class Fetch:
    """One fetch of random windows in random states of the blocks, and how it is run."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.protect_from, self.stamp = 2 * STEP, 2 * STEP + 1
        wanted = rng.sample(range(NUM_PAIRS), rng.randint(4, 20))
        self.windows = [rng.sample(wanted, rng.randint(0, 4)) for _ in range(rng.randint(1, 5))]
        self.num_claims, self.num_recalls = rng.randint(1, 3), rng.randint(1, 3)
        self.num_blocks = rng.randint(1, 24)
        self.held = rng.sample(range(self.num_blocks), rng.randint(0, self.num_blocks))
        self.free = [block for block in range(self.num_blocks) if block not in self.held]
        self.owner_at_first = dict(zip(self.held, rng.sample(range(NUM_PAIRS), len(self.held)), strict=True))
        self.used_at_first = {block: rng.choice((3, 70, 99, 100, 101)) for block in self.held}
        self.memory = Memory(self._cells(), rng)
        self.by_ticket = self.waits_for_lookups = self.waits_for_claims = True

    def _cells(self) -> dict:
        cells = dict.fromkeys(("tickets", "looked up", "claimed", "count", "hits", "evictions"), 0)
        cells |= {"free": len(self.free), "hand": self.rng.randrange(9)}
        cells |= {("table", pair): -1 for pair in range(NUM_PAIRS)}
        cells |= {("table", pair): block for block, pair in self.owner_at_first.items()}
        for block in range(self.num_blocks):
            pair = self.owner_at_first.get(block, -1)
            cells |= {("owner", block): pair, ("holds", block): pair}
            cells[("used", block)] = self.used_at_first.get(block, -1)
        cells |= {("stack", i): block for i, block in enumerate(self.free)}
        for i in range(sum(map(len, self.windows))):
            cells |= {("pair", i): -9, ("entry", i): -9, ("claimed", i): -9, ("read", i): -9}
        return cells

    def run(self) -> None:
        num_programs = len(self.windows) + self.num_claims + self.num_recalls
        run_interleaved(self.memory, self.program, num_programs, self.rng.randint(1, num_programs))
        self.check()

    def program(self, p: Program, index: int) -> Iterator[object]:
        ticket = p.add("tickets", 1) if self.by_ticket else index
        yield
        num_rows = len(self.windows)
        claim, recall = ticket - num_rows, ticket - num_rows - self.num_claims
        if claim < 0:
            yield from self.look_up(p, ticket)
            p.release("looked up")
            return
        while self.waits_for_lookups and p.acquire("looked up") < num_rows:
            yield WAITING
        if recall < 0:
            for first in range(claim * PAIRS, p.load("count"), self.num_claims * PAIRS):
                yield from self.claim(p, first, min(PAIRS, p.load("count") - first))
            p.release("claimed")
        elif recall < p.load("count"):
            while self.waits_for_claims and p.acquire("claimed") < self.num_claims:
                yield WAITING
            yield from self.recall(p, recall)

    def look_up(self, p: Program, row: int) -> Iterator[object]:
        start, missing = sum(map(len, self.windows[:row])), []
        for entry, pair in enumerate(self.windows[row], start):
            block = p.load(("table", pair))
            yield
            p.store(("read", entry), max(block, 0))
            if block >= 0:
                p.update(("used", block), lambda stamp: max(stamp, self.stamp))
                p.add("hits", 1)
            else:
                missing.append((pair, entry))
            yield
        first = p.add("count", len(missing))
        for i, (pair, entry) in enumerate(missing, first):
            p.store(("pair", i), pair)
            p.store(("entry", i), entry)
            yield

    def claim(self, p: Program, first: int, size: int) -> Iterator[object]:
        pairs, ours = {i: p.load(("pair", i)) for i in range(first, first + size)}, []
        for i in self.rng.sample(list(pairs), size):
            yield
            if p.swap(("table", pairs[i]), -1, CLAIMING):
                ours.append(i)
        blocks = []
        if ours:
            yield
            free = p.add("free", -len(ours))
            served = min(max(free, 0), len(ours))
            yield
            p.add("free", len(ours) - served)
            for i in range(served):
                blocks.append(p.load(("stack", free - 1 - i)))
                p.store(("used", blocks[-1]), self.stamp)
                yield
            yield from self.evict(p, blocks, len(ours))
        of_pair = dict(zip(ours, blocks, strict=False))
        for i in pairs:
            block = of_pair.get(i, -1)
            if block >= 0:
                p.store(("owner", block), pairs[i])
            if i in ours:
                p.store(("table", pairs[i]), block)
            p.store(("claimed", i), block)
            yield

    def evict(self, p: Program, blocks: list[int], wanted: int) -> Iterator[object]:
        """Take blocks as the hand passes, then whatever blocks may go."""
        for _ in range(2):
            start = p.add("hand", SPAN) if len(blocks) < wanted else 0
            yield
            yield from self.evict_of(p, start, min(SPAN, self.num_blocks), min(MOST, wanted - len(blocks)), blocks)
        is_lost = True
        while is_lost and len(blocks) < wanted:
            is_lost = yield from self.evict_of(p, 0, self.num_blocks, wanted - len(blocks), blocks)

    def evict_of(self, p: Program, start: int, span: int, most: int, blocks: list[int]) -> Iterator[object]:
        used = {}
        for block in ((start + lane) % self.num_blocks for lane in range(span)):
            used[block] = p.load_fresh(("used", block))
            yield
        victims = sorted((stamp, block) for block, stamp in used.items() if 0 <= stamp < self.protect_from)[:most]
        is_lost = False
        for stamp, block in victims:
            pair = p.load(("owner", block))
            yield
            if p.swap(("used", block), stamp, self.stamp):
                p.store(("table", pair), -1)
                p.add("evictions", 1)
                blocks.append(block)
            else:
                is_lost = True
            yield
        return is_lost

    def recall(self, p: Program, first: int) -> Iterator[object]:
        for i in range(first, p.load("count"), self.num_recalls):
            pair, block = p.load(("pair", i)), p.load(("claimed", i))
            yield
            p.store(("read", p.load(("entry", i))), max(p.load(("table", pair)), 0))
            if block >= 0:
                p.store(("holds", block), pair)
            yield

    def check(self) -> None:
        """The contract of the reference."""
        cells, entries = self.memory.cells, [pair for window in self.windows for pair in window]
        table, owner, used, holds = (
            [cells[name, i] for i in range(size)]
            for name, size in (("table", NUM_PAIRS), *((name, self.num_blocks) for name in ("owner", "used", "holds")))
        )
        block_at_first = {pair: block for block, pair in self.owner_at_first.items()}
        found, missing = ({pair for pair in entries if (pair in block_at_first) == is_in} for is_in in (True, False))
        assert all(table[pair] == block_at_first[pair] for pair in found)
        assert cells["hits"] == sum(pair in found for pair in entries)
        assert cells["count"] == sum(pair in missing for pair in entries)
        may_go = [
            b for b, stamp in self.used_at_first.items() if stamp < 2 * STEP and self.owner_at_first[b] not in found
        ]
        served = {pair for pair in missing if table[pair] >= 0}
        assert len(served) == min(len(missing), len(self.free) + len(may_go))
        assert cells["evictions"] == max(0, len(served) - len(self.free))
        assert cells["free"] == max(0, len(self.free) - len(missing))
        assert min(table) >= -1 and owner == holds
        assert sorted(block for block in table if block >= 0) == [b for b, pair in enumerate(owner) if pair >= 0]
        assert all(table[pair] == block for block, pair in enumerate(owner) if pair >= 0)
        assert all(used[table[pair]] >= 2 * STEP for pair in found | served)
        assert [cells["read", i] for i in range(len(entries))] == [max(table[pair], 0) for pair in entries]
        copied = [cells["claimed", i] for i in range(cells["count"]) if cells["claimed", i] >= 0]
        assert sorted(copied) == sorted(table[pair] for pair in served)


def test_the_contract_holds_in_any_order() -> None:
    for seed in range(TRIALS):
        Fetch(seed).run()


@pytest.mark.parametrize(
    ("left_out", "fault"),
    [
        ("by_ticket", Deadlock),
        ("waits_for_lookups", (AssertionError, KeyError)),  # of a pair that is not listed yet
        ("waits_for_claims", AssertionError),
    ],
)
def test_nothing_of_the_protocol_can_be_left_out(left_out: str, fault: type[Exception] | tuple) -> None:
    with pytest.raises(fault):
        for seed in range(TRIALS):
            fetch = Fetch(seed)
            setattr(fetch, left_out, False)
            fetch.run()
