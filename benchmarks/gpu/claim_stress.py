"""Phase claim-stress: claims of contending programs at real sizes; after each the whole contract is checked.

An interpreter runs programs one after the other, so that nothing contends. Here many entries want one pair, few blocks
may go, some are free, and stamps are of every kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu.session import Session
from freekv_kernels import BlockTables, Claim, Count, MissList, triton_ops

STEP = 50
_PAIRS_PER_BLOCK = 6
# Blocks, most entries of a list, launches: a claim of few blocks contends most, one of many is what a server has.
_SIZES = ((64, 512, 150), (1024, 4096, 100), (4096, 4096, 100), (32768, 16384, 60))
_REHEARSED = ((16, 24, 4), (100, 100, 2))


@dataclass
class Launch:
    """Tables and a list before a claim, all on the CPU; the number of the launch is its seed."""

    number: int
    num_blocks: int
    most: int

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.number)
        num_pairs = _PAIRS_PER_BLOCK * self.num_blocks
        self.claim = list(Claim)[self._below(len(Claim))]
        num_held = self.num_blocks if self._below(2) else self._below(self.num_blocks + 1)
        blocks, pairs = self._shuffled(self.num_blocks), self._shuffled(num_pairs)
        held, free, owners = blocks[:num_held], blocks[num_held:], pairs[:num_held]
        self.table = torch.full((num_pairs,), -1, dtype=torch.int32)
        self.owner, self.last_used = torch.full((2, self.num_blocks), -1, dtype=torch.int32)
        self.table[owners], self.owner[held] = held.int(), owners.int()
        # One in `scarcity` blocks is older than what the step reads.
        scarcity = (1, 2, 4, 1000)[self._below(4)]
        is_old = torch.randint(scarcity, (num_held,), generator=self._generator) == 0
        self.last_used[held] = torch.where(is_old, 2 * STEP - 1 - self._stamps(num_held), 2 * STEP).int()
        self.last_used[held[: num_held // 8]] += 1
        self.stack = torch.zeros(self.num_blocks, dtype=torch.int32)
        self.stack[: len(free)] = free.int()
        self.num_free = len(free)
        # A listed pair has no block when a claim starts, and may be listed many times.
        pool = pairs[num_held:][: 1 + self._below(min(self.most, num_pairs - num_held))]
        choice = torch.randint(len(pool), (1 + self._below(self.most),), generator=self._generator)
        self.wanted = pool[choice]
        self.hand = self._below(2**31)

    def _below(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self._generator))

    def _shuffled(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self._generator)

    def _stamps(self, count: int) -> torch.Tensor:
        return torch.randint(8, (count,), generator=self._generator)

    def tables(self, device: str) -> BlockTables:
        """Before the claim, of one layer; copies."""

        def layer(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[None].to(device, copy=True)

        return BlockTables(
            table=layer(self.table)[..., None],
            owner=layer(self.owner),
            last_used=layer(self.last_used),
            free_blocks=layer(self.stack),
            num_free=torch.tensor([self.num_free], dtype=torch.int32, device=device),
            hand=torch.tensor([self.hand], dtype=torch.int32, device=device),
        )

    def run(self, device: str) -> tuple[BlockTables, torch.Tensor]:
        """Claim on the device; the tables after it and the blocks of the entries, on the CPU, of one layer."""
        tables = self.tables(device)
        count = torch.tensor([len(self.wanted)], dtype=torch.int32, device=device)
        entries, blocks = torch.full((2, len(self.wanted)), -7, dtype=torch.int32, device=device)
        misses = MissList(self.wanted.to(device), count, entries, blocks)
        step = torch.tensor([STEP], device=device)
        self.counters = torch.zeros(len(Count), dtype=torch.int64, device=device)
        triton_ops().claim_blocks(misses, tables, step, self.claim, self.counters)
        return BlockTables(*(tensor.cpu().flatten() for tensor in tables)), blocks.cpu()

    def broken(self, after: BlockTables, blocks: torch.Tensor) -> list[str]:
        """What of the contract does not hold."""
        table, owner, last_used, stack, num_free, _ = after
        distinct = self.wanted.unique()
        protected = self.last_used >= 2 * STEP + self.claim.protect_back
        victims = int(((self.last_used >= 0) & ~protected).sum())
        held = (owner >= 0).nonzero().flatten()
        free = stack[: int(num_free)].long()
        served = blocks >= 0
        stamp = 2 * STEP + self.claim.stamp_back
        evicted = int(self.counters[Count.EVICTIONS])
        num_served = min(len(distinct), self.num_free + victims)
        holds = {
            "as many pairs are served as blocks may go": int((table[distinct] >= 0).sum()) == num_served,
            "each served pair is served at one entry": int(served.sum()) == num_served,
            "entries say what the table says": torch.equal(blocks[served], table[self.wanted[served]]),
            "no other entry is written": int(blocks.min()) >= -1,
            "table and owners are each other's inverse": torch.equal(table[owner[held].long()].long(), held)
            and int((table >= 0).sum()) == len(held),
            "free blocks go first": int(num_free) == max(0, self.num_free - len(distinct)),
            "free blocks have no owner and no stamp": bool((owner[free] == -1).all() and (last_used[free] == -1).all()),
            "no block is free twice": len(free.unique()) == len(free) == len(owner) - len(held),
            "protected blocks stay as they were": torch.equal(owner[protected], self.owner[protected])
            and torch.equal(last_used[protected], self.last_used[protected]),
            "claimed blocks carry the stamp": bool((last_used[blocks[served].long()] == stamp).all()),
            "evictions are counted": evicted == num_served - min(self.num_free, num_served),
        }
        return [what for what, does in holds.items() if not does]


def run(session: Session) -> None:
    for num_blocks, most, num_launches in _REHEARSED if session.is_rehearsal else _SIZES:
        faults, num_done = [], 0
        for number in range(num_launches):
            if session.left < 1:
                break
            launch, num_done = Launch(number, num_blocks, most), num_done + 1
            faults += [f"launch {number}: {fault}" for fault in launch.broken(*launch.run(session.device))]
        session.record("claims", num_done, "launches", blocks=num_blocks, entries=most)
        if num_done:
            session.check(f"claims of {num_blocks} blocks keep their contract", not faults, "; ".join(faults[:5]))
