"""Windows, step by step, through the ops that keep the device cache: one layer of a large batch, without attention."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from freekv_kernels import REFERENCE, Batch, Claim, Count, FlagList, Half, MissList
from sglang_freekv.memory.device_blocks import DeviceBlocks
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.layers import WINDOWED

FIRST = 96  # steps that fill the cache and are not counted


class Claims(NamedTuple):
    """What the claims of a replay took, without the first steps."""

    hit_share: float  # of the window entries of a step
    evictions: np.ndarray  # int64 [num_steps], blocks taken from other pages
    looks: np.ndarray  # the same, blocks looked at for them

    @property
    def looks_per_claim(self) -> np.ndarray:
        """Of each step that took a block."""
        taken = self.evictions > 0
        return self.looks[taken] / self.evictions[taken]


class Replay:
    """The cache of one layer, with so many windows of blocks for each request; every request has pages of its own.

    Parameters
    ----------
    requests : int32, ``[num_steps, batch_size, num_kv_heads, width]``
        What each step selects for the next one.
    num_pages : int
        Of a request.
    """

    def __init__(self, requests: torch.Tensor, num_pages: int, windows: float) -> None:
        self._requests = requests
        _, batch_size, num_kv_heads, width = requests.shape
        num_entries = requests[0].numel()
        self.counters = torch.zeros(len(Count), dtype=torch.int64)
        self.blocks = DeviceBlocks(
            Geometry(1, num_kv_heads, num_kv_heads, head_dim=1, dtype=torch.bfloat16, page_size=1),
            REFERENCE,
            num_host_pages=batch_size * num_pages,
            num_blocks=int(windows * num_entries),
            kinds=(WINDOWED,),
            counters=self.counters,
            device="cpu",
        )
        rows, many = torch.arange(batch_size), torch.full((batch_size,), num_pages)
        pages = torch.arange(batch_size * num_pages).view(batch_size, -1)
        budgets = torch.full((batch_size, num_kv_heads), width)
        self._batch = Batch(rows, rows, pages, many, many, budgets, self.blocks.step)
        self._windows = torch.full((2, batch_size, num_kv_heads, width), -1, dtype=torch.int32)
        entries = torch.zeros((2, num_entries), dtype=torch.int32)
        self._misses = MissList(entries[0].long(), torch.zeros(1, dtype=torch.int32), *entries)
        self._front = (
            FlagList(rows, rows, torch.zeros(batch_size * num_kv_heads, dtype=torch.bool)),
            torch.arange(batch_size * num_kv_heads + 1, dtype=torch.int32) * width,
            torch.zeros(num_entries, dtype=torch.int32),
        )

    def run(self) -> Claims:
        """Every step reads what the step before selected, keeps it, and claims what it selects itself."""
        found = []
        for number, pages in enumerate(self._requests, start=1):
            before = self.counters.clone()
            self.blocks.advance(number)
            self._windows[(number + 1) % 2] = pages
            self._make_resident(Half.FRONT, *self._front)
            self._make_resident(Half.BACK)
            found.append((self.counters - before).numpy())
        self.blocks.check_integrity()
        counted = np.stack(found)[FIRST:]
        if counted[:, Count.DEMAND_MISSES].any():
            raise RuntimeError("a page of a front window had lost its block")
        hits, misses = counted[:, Count.HITS].sum(), counted[:, Count.MISSES].sum()
        return Claims(float(hits / (hits + misses)), counted[:, Count.EVICTIONS], counted[:, Count.LOOKS])

    def _make_resident(self, half: Half, *front: object) -> None:
        """As `residency` does, without the copies."""
        tables, misses = self.blocks.tables, self._misses
        misses.count.zero_()
        REFERENCE.lookup_blocks(self._windows, self._batch, half, tables, misses, self.counters, *front)
        REFERENCE.claim_blocks(misses, tables, self.blocks.step, Claim.IN_STEP, self.counters)
