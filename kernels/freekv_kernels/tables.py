"""What the ops work on: the tables of a batch, of the device blocks and of the lists that one op leaves for the next.

Tensors only, all on the device of the batch. Lists have a fixed capacity and a count that is read on the device, so
that a CUDA graph can hold the ops.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch


class Read(IntEnum):
    """Which windows an op is about."""

    FRONT = 0  # read by this step
    BACK = 1  # read by the next step
    FIRST = 2  # of a request whose prompt is complete: both, until the first step


class Count(IntEnum):
    """Index of a counter: totals since start-up. A row is one (request, KV head) of one layer and step."""

    ROWS = 0  # rows of requests over their budget
    FLAGGED_ROWS = 1  # of those, rows whose query had moved: corrected before attention
    HITS = 2  # selected (page, head) pairs that were resident
    MISSES = 3  # selected pairs that were not
    DEMAND_MISSES = 4  # pairs of a front window that had lost their block since they were selected
    RECALLS = 5  # copies of a (page, head) from the host store to its block
    ABSENT_PAGES = 6  # window entries without a block when attention ran: must stay 0


class Batch(NamedTuple):
    """The requests of one step; lengths include the new token. Padding has row 0 and no pages."""

    rows: torch.Tensor  # int64 [batch_size], rows of the request table
    slots: torch.Tensor  # int64 [batch_size], token slots of the new tokens (decode)
    page_table: torch.Tensor  # int64 [batch_size, max_pages], logical page -> host page
    num_pages: torch.Tensor  # int64 [batch_size]
    num_pages_next: torch.Tensor  # int64 [batch_size], with one token more
    budget_pages: torch.Tensor  # int64 [batch_size]
    step: torch.Tensor  # int64 [1], number of the decode step; step % 2 is the front of the windows

    def num_pages_at(self, read: Read) -> torch.Tensor:
        """Pages of each request at the step that reads the windows."""
        return self.num_pages if read == Read.FRONT else self.num_pages_next


class BlockTables(NamedTuple):
    """The state of the device blocks; ops on one layer take it without the leading dimension."""

    table: torch.Tensor  # int32 [num_layers, num_pages, num_kv_heads], -1 where not resident
    owner: torch.Tensor  # int32 [num_layers, num_blocks], key of each block: page * num_kv_heads + head; -1 where free
    last_used: torch.Tensor  # int32 [num_layers, num_blocks], stamp of the last use; -1 where free
    free_blocks: torch.Tensor  # int32 [num_layers, num_blocks], a stack: the first num_free entries are the free blocks
    num_free: torch.Tensor  # int32 [num_layers]
    hand: torch.Tensor  # int32 [num_layers], where the search for victims goes on

    def layers(self, first: int, last: int) -> BlockTables:
        """The state of the layers first to last - 1, with the leading dimension."""
        return BlockTables(*(tensor[first:last] for tensor in self))


class KeyList(NamedTuple):
    """Keys of the block table: page * num_kv_heads + head."""

    keys: torch.Tensor  # int64 [capacity]
    count: torch.Tensor  # int32 [1]


class MissList(NamedTuple):
    """Keys that a window wants and that had no block when it was looked up; a key may be wanted twice."""

    keys: torch.Tensor  # int64 [capacity]
    count: torch.Tensor  # int32 [1]
    entries: torch.Tensor  # int32 [capacity], index of the window entry in kv_indices
    blocks: torch.Tensor  # int32 [capacity], block to copy the key into; -1: another entry's copy, or no block


class FlagList(NamedTuple):
    """Rows, request * num_kv_heads + head, whose query has moved."""

    rows: torch.Tensor  # int32 [batch_size * num_kv_heads], listed in any order
    count: torch.Tensor  # int32 [1]
    is_flagged: torch.Tensor  # bool [batch_size * num_kv_heads]
