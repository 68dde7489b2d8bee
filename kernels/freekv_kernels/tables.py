"""What the ops work on: the tables of a batch, of the device blocks and of the lists that one op leaves for the next.

Tensors only, all on the device of the batch. Lists have a fixed capacity and a count that is read on the device, so
that a CUDA graph can hold the ops.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import NamedTuple

import torch

from freekv_kernels.records import PLAIN, Codec

GROUP_PAGES = 4  # logical pages 4i to 4i + 3 of a request; the last one's summary can hold the bounds of all four


class Half(IntEnum):
    """Which half of the windows' double buffer an op is about."""

    FRONT = 0  # read by this step
    BACK = 1  # read by the next step
    BOTH = 2  # of a request whose prompt is complete: the same in both, until its first step

    def indices(self, step: int) -> list[int]:
        """Where the half lies in the double buffer at that step."""
        return [0, 1] if self == Half.BOTH else [(step + self) % 2]


class Claim(Enum):
    """When blocks are claimed, and for whom: (what this step alone reads may go, the next step reads what is claimed).

    What may go is said by stamps, 2 * step for blocks that the step reads and 2 * step + 1 for those of the next step.
    """

    IN_STEP = (False, True)  # what this step reads stays too
    BETWEEN_STEPS = (True, True)  # this step is over; what the next one reads stays
    AS_OLD = (True, False)  # the same, and the claimed blocks are the first to go again

    @property
    def protect_back(self) -> bool:
        """Whether blocks stamped 2 * step may go."""
        return self.value[0]

    @property
    def stamp_back(self) -> bool:
        """Whether claimed blocks are stamped 2 * step + 1."""
        return self.value[1]


class Count(IntEnum):
    """Index of a counter: totals since start-up. A row is one (request, KV head) of one layer and step."""

    ROWS = 0  # rows of requests over their budget
    FLAGGED_ROWS = 1  # of those, rows that selected again before attention: corrected
    HITS = 2  # selected (page, head) pairs that were resident
    MISSES = 3  # selected pairs that were not
    DEMAND_MISSES = 4  # pairs of a front window that had lost their block since they were selected
    RECALLS = 5  # copies of a (page, head) from the host store to its block
    ABSENT_PAGES = 6  # window entries without a block when attention ran: must stay 0
    EVICTIONS = 7  # blocks that were taken from a pair for another
    LOOKS = 8  # blocks that were looked at for these
    PAGES_READ = 9  # pages that ROWS attended to
    SCORED_ROWS = 10  # rows over their budget in the next step that select for it: all, or those that are due
    SCORED_PAGES = 11  # pages of SCORED_ROWS, before any are listed


class Batch(NamedTuple):
    """The requests of one step; lengths include the new token. Padding has row 0 and no pages."""

    rows: torch.Tensor  # int64 [batch_size], rows of the request table
    slots: torch.Tensor  # int64 [batch_size], token slots of the new tokens (decode)
    page_table: torch.Tensor  # int64 [batch_size, max_pages], logical page -> host page
    num_pages: torch.Tensor  # int64 [batch_size]
    num_pages_next: torch.Tensor  # int64 [batch_size], with one token more
    budget_pages: torch.Tensor  # int64 [batch_size, num_kv_heads]
    step: torch.Tensor  # int64 [1], number of the decode step; step % 2 is the front of the windows
    # int64 [batch_size, GROUP_PAGES] (decode), host pages of the group that ends with the new token's page, else -1
    groups: torch.Tensor | None = None

    def one(self, i: int) -> Batch:
        """Request i alone, without the group that its page ends."""
        return Batch(*(tensor[i : i + 1] for tensor in self[: Batch._fields.index("step")]), self.step)

    def num_pages_at(self, half: Half) -> torch.Tensor:
        """Pages of each request at the step that reads the windows."""
        return self.num_pages if half == Half.FRONT else self.num_pages_next


class PageStore(NamedTuple):
    """Where one layer keeps its pages: the complete KV, what its pages are summarised by, and their blocks."""

    host_kv: torch.Tensor  # [num_host_pages, num_kv_heads, *record], CPU (pinned), a strided view; see `records`
    summary: (
        torch.Tensor | None
    )  # uint8 [num_host_pages, num_kv_heads, 2, head_dim], bounds of a page's keys, see `fp8`
    block_kv: torch.Tensor  # model dtype [num_blocks, 2, page_size, head_dim]
    table: torch.Tensor  # int32 [num_host_pages, num_kv_heads], block of each pair, -1 where not resident
    codec: Codec = PLAIN  # of the records


class BlockTables(NamedTuple):
    """The state of the device blocks of some layers."""

    table: torch.Tensor  # int32 [num_layers, num_host_pages, num_kv_heads], -1 where not resident
    owner: torch.Tensor  # int32 [num_layers, num_blocks], pair of each block; -1 where free
    last_used: torch.Tensor  # int32 [num_layers, num_blocks], stamp of the last use; -1 where free
    free_blocks: torch.Tensor  # int32 [num_layers, num_blocks], a stack: the first num_free entries are the free blocks
    num_free: torch.Tensor  # int32 [num_layers]
    hand: torch.Tensor  # int32 [num_layers], where the search for victims goes on

    def layers(self, first: int, last: int) -> BlockTables:
        """The state of the layers first to last - 1, with the leading dimension."""
        return BlockTables(*(tensor[first:last] for tensor in self))


class PairList(NamedTuple):
    """(page, head) pairs as numbers: host page * num_kv_heads + head, the place in a layer of the block table."""

    pairs: torch.Tensor  # int64 [capacity]
    count: torch.Tensor  # int32 [1]


def pairs_of(pages: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """The pairs of host pages (int64 ``[...]``): int64 ``[..., num_kv_heads]``."""
    return pages[..., None] * num_kv_heads + torch.arange(num_kv_heads, device=pages.device)


class MissList(NamedTuple):
    """Pairs that a window wants and that had no block when it was looked up; a pair may be wanted twice."""

    pairs: torch.Tensor  # int64 [capacity]
    count: torch.Tensor  # int32 [1]
    entries: torch.Tensor  # int32 [capacity], index of the window entry in kv_indices
    blocks: torch.Tensor  # int32 [capacity], block to copy the pair into; -1: another entry's copy, or no block
    # int32 [3], for `fetch_blocks` alone: programs that have started, that have looked up, that have claimed. 0 before,
    # as the count: a second launch without that finds all done.
    progress: torch.Tensor | None = None


class FlagList(NamedTuple):
    """Rows, request * num_kv_heads + head: that select again, as the window lacks too much or the query has moved; or
    that are due, as their pages are scored in this step.
    """

    rows: torch.Tensor  # int32 [batch_size * num_kv_heads], listed in any order
    count: torch.Tensor  # int32 [1]
    is_flagged: torch.Tensor  # bool [batch_size * num_kv_heads]
