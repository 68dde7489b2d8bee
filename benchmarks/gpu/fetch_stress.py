"""Phase fetch-stress: fetches of many rows that want the same few pages, with few blocks; then the whole contract.

Within one launch rows look up, claims contend and pages are copied, in the order of tickets: whatever one program does
too early shows as a block that a row has lost, as a page in a wrong block or as an entry without one. Where rows find
their pages, and what they miss, is the reference's; what becomes of that is `claim_stress`'s contract, and then every
block must hold its owner's page, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu.claim_stress import STEP, Launch
from benchmarks.gpu.session import Session
from freekv_kernels import REFERENCE, Batch, BlockTables, Count, FlagList, Half, MissList, Ops, PageStore, triton_ops
from freekv_kernels.fetch_blocks import claim_of

_HEADS, _PAGE, _DIM = 4, 8, 16  # records of 1 KiB: a copy is short, so that others are still at work
# Blocks, most entries of the windows, launches.
_SIZES = ((64, 2048, 120), (1024, 8192, 80), (8192, 16384, 40))
_REHEARSED = ((16, 32, 2), (8, 48, 1))


@dataclass
class Fetch(Launch):
    """Windows of a batch whose requests share pages, and the tables and blocks before they are fetched."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.half, self.width = list(Half)[self._below(len(Half))], min(16, self.most // 8)
        self.claim, self.batch_size = claim_of(self.half), max(1, self.most // (_HEADS * self.width))
        num_host_pages, longest = len(self.table) // _HEADS, 2 * self.width
        shared = self._shuffled(num_host_pages)[: longest + self._below(max(1, num_host_pages - longest))]
        self.batch = self._make_batch(shared, min(longest, len(shared)))
        self.windows = self._make_windows()
        self.host_kv = torch.arange(len(self.table), dtype=torch.float32).view(-1, _HEADS, 1, 1, 1)
        self.host_kv = self.host_kv.expand(-1, -1, 2, _PAGE, _DIM).contiguous()
        entries = self.batch.num_pages.clamp(max=self.width).repeat_interleave(_HEADS).cumsum(0)
        self.kv_indptr = torch.cat((entries.new_zeros(1), entries)).int()
        self.is_flagged = torch.rand(self.num_rows, generator=self._generator) < 0.5
        self._look_up()

    @property
    def num_rows(self) -> int:
        return self.batch_size * _HEADS

    def _make_batch(self, shared: torch.Tensor, longest: int) -> Batch:
        size = self.batch_size
        num_pages = 1 + torch.randint(longest, (size,), generator=self._generator)
        opens = torch.randint(2, (size,), generator=self._generator)
        pages = torch.stack([shared[self._shuffled(len(shared))[:longest]] for _ in range(size)])
        return Batch(
            rows=1 + self._shuffled(size),
            slots=torch.zeros(size, dtype=torch.int64),
            page_table=torch.cat((pages, pages[:, :1]), 1),
            num_pages=num_pages,
            num_pages_next=num_pages + opens,
            budget_pages=torch.full((size, _HEADS), self.width),
            step=torch.tensor([STEP]),
        )

    def _make_windows(self) -> torch.Tensor:
        """Of each row the budget's number of its pages, in both halves; padded by -1."""
        longest = int(self.batch.num_pages_next.max())
        order = torch.rand(2, self.batch_size, _HEADS, longest, generator=self._generator)
        order.masked_fill_(torch.arange(longest) >= self.batch.num_pages_next[:, None, None], 2)
        chosen = order.argsort(-1)[..., : self.width].sort(-1).values.int()
        is_page = chosen < self.batch.num_pages_next[:, None, None]
        windows = torch.full((2, self.batch_size + 1, _HEADS, self.width), -1, dtype=torch.int32)
        windows[:, self.batch.rows, :, : chosen.shape[-1]] = chosen.where(is_page, -1)
        return windows

    def _look_up(self) -> None:
        """What rows find, and what they miss, before any block is taken: the reference's."""
        self.held_at_first = self.owner.clone()
        self.found = self._run(REFERENCE, "cpu", "lookup_blocks")
        self.last_used, self.wanted = self.found.blocks.last_used[0], self.found.missing

    def run(self, device: str) -> _Outcome:
        """Fetch on the device; everything after it, on the CPU."""
        return self._run(triton_ops(), device, "fetch_blocks")

    def _run(self, ops: Ops, device: str, op: str) -> _Outcome:
        tables = self.tables(device)
        blocks = tables._replace(table=tables.table.view(1, -1, _HEADS))
        out = _Outcome.before(self, blocks, device)
        batch = Batch(*(x.to(device) for x in self.batch if x is not None))
        windows, front = self.windows.to(device), ()
        if self.half == Half.FRONT:
            flags = FlagList(None, None, self.is_flagged.to(device))
            front = (flags, self.kv_indptr.to(device), out.kv_indices)
        store = () if op == "lookup_blocks" else (self._store(out.block_kv, blocks, device),)
        getattr(ops, op)(windows, batch, self.half, *store, blocks, out.misses, out.counters, *front)
        return out.on_cpu()

    def _store(self, block_kv: torch.Tensor, blocks: BlockTables, device: str) -> PageStore:
        host = self.host_kv if device == "cpu" else self.host_kv.pin_memory()
        return PageStore(host, None, block_kv, blocks.table[0])

    def broken(self, out: _Outcome) -> list[str]:
        """What of the contract does not hold."""
        if not self.found.lists(out):  # then nothing else can be said of it
            return ["what is missing is listed, each entry once"]
        self.wanted, self.counters = out.missing, out.counters
        after = BlockTables(*(tensor.flatten() for tensor in out.blocks))
        claimed = super().broken(after, out.misses.blocks[: len(out.missing)]) if len(out.missing) else []
        return claimed + [what for what, does in self._holds(out, after).items() if not does]

    def _holds(self, out: _Outcome, after: BlockTables) -> dict[str, bool]:
        found_before, table, owner = self.found, after.table, after.owner
        held = (owner >= 0).nonzero().flatten()
        read = found_before.kv_indices.clone()  # of what is found; a missing entry follows the table
        read[out.misses.entries[: len(out.missing)].long()] = table[out.missing].clamp(min=0)
        absent = int((table[out.missing] < 0).sum()) if self.half == Half.FRONT else 0
        same = (Count.HITS, Count.MISSES, Count.DEMAND_MISSES)
        protected = self.last_used >= 2 * STEP + self.claim.protect_back
        untouched = (owner == self.held_at_first) & (owner >= 0)
        return {
            "every block holds its owner's page": bool((out.block_kv[held] == owner[held, None].float()).all()),
            "blocks that nobody has are not written": bool(out.block_kv[owner < 0].isnan().all()),
            "entries say where their pages are": self.half != Half.FRONT or torch.equal(out.kv_indices, read),
            "what a row has found stays": torch.equal(owner[protected], self.held_at_first[protected]),
            "stamps of what stays are the lookups'": torch.equal(after.last_used[untouched], self.last_used[untouched]),
            "hits and misses are counted": all(int(out.counters[c]) == int(found_before.counters[c]) for c in same),
            "recalls are counted": int(out.counters[Count.RECALLS]) == int((out.misses.blocks >= 0).sum()),
            "absent pages are counted": int(out.counters[Count.ABSENT_PAGES]) == absent,
            "every row has looked up, once": int(out.misses.progress[1]) == self.num_rows,
            "every program has its ticket": int(out.misses.progress[0]) >= sum(map(int, out.misses.progress[1:])),
        }


@dataclass
class _Outcome:
    """What a fetch, or a lookup, writes."""

    blocks: BlockTables
    misses: MissList
    counters: torch.Tensor
    kv_indices: torch.Tensor
    block_kv: torch.Tensor

    @classmethod
    def before(cls, fetch: Fetch, blocks: BlockTables, device: str) -> _Outcome:
        capacity = fetch.num_rows * fetch.width
        entries, claimed = torch.full((2, capacity), -7, dtype=torch.int32, device=device)
        pairs = torch.full((capacity,), -7, dtype=torch.int64, device=device)
        zeros = torch.zeros(4, dtype=torch.int32, device=device)
        held = fetch.owner >= 0
        block_kv = torch.where(held, fetch.owner.float(), torch.nan)[:, None].expand(-1, 2 * _PAGE * _DIM).contiguous()
        return cls(
            blocks,
            MissList(pairs, zeros[:1], entries, claimed, zeros[1:]),
            torch.zeros(len(Count), dtype=torch.int64, device=device),
            torch.zeros(capacity, dtype=torch.int32, device=device),
            block_kv.view(-1, 2, _PAGE, _DIM).to(device),
        )

    @property
    def missing(self) -> torch.Tensor:
        """Pairs, in the order of their list."""
        return self.misses.pairs[: int(self.misses.count)]

    def lists(self, other: _Outcome) -> bool:
        """Whether the other's list has the same, in any order: by entry where entries are written (FRONT)."""
        return all(
            torch.equal(a[: len(self.missing)].sort().values, b[: len(other.missing)].sort().values)
            for a, b in ((self.misses.pairs, other.misses.pairs), (self.misses.entries, other.misses.entries))
        )

    def on_cpu(self) -> _Outcome:
        return _Outcome(
            BlockTables(*(tensor.cpu() for tensor in self.blocks)),
            MissList(*(tensor.cpu() for tensor in self.misses)),
            self.counters.cpu(),
            self.kv_indices.cpu(),
            self.block_kv.flatten(1).cpu(),
        )


def run(session: Session) -> None:
    for num_blocks, most, num_launches in _REHEARSED if session.is_rehearsal else _SIZES:
        faults, num_done, num_missing = [], 0, 0
        for number in range(num_launches):
            if session.left < 1:
                break
            fetch, num_done = Fetch(number, num_blocks, most), num_done + 1
            faults += [f"launch {number}: {fault}" for fault in fetch.broken(fetch.run(session.device))]
            num_missing += len(fetch.wanted)
        session.record("fetches", num_done, "launches", blocks=num_blocks, entries=most, missing=num_missing)
        if num_done:
            session.check(f"fetches into {num_blocks} blocks keep their contract", not faults, "; ".join(faults[:5]))
