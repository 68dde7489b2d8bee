"""A line in the log for each request that ends beyond its budget: how much of its KV it read, and what that took."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

from sglang_freekv.memory.units import in_words
from sglang_freekv.releases import release

if TYPE_CHECKING:
    import torch
    from sglang.srt.managers.schedule_batch import Req

    from sglang_freekv.memory.kv_memory import KVMemory

logger = logging.getLogger(__name__)


class RequestLog:
    """Requests within their budget attend to everything and get no line, nor does a turn of a streaming session.

    Where the blocks are and what was counted lies on the device. On a CPU that is read when a request ends; on a GPU it
    would have to be waited for, so the line ends before, and the totals are on the decode lines as ever.
    """

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory
        self._told: Counter[str] = Counter()  # totals of the last line

    def end(self, req: Req, slots: torch.Tensor) -> None:
        """A request has ended and still has its row; `slots` are those of its tokens, int64 ``[n]``, device."""
        page_size = self._memory.geometry.page_size
        num_prompt, num_new = len(req.origin_input_ids), len(req.output_ids)
        row = release.row_of(req)
        budget = page_size * max(self._memory.budgets.of(row))
        if num_new < 2 or len(slots) <= budget:  # the first token comes from the prompt, which attends to all of it
            return
        # Where budgets follow the mass, only the device knows how many.
        up_to = "up to " if self._memory.budgets.mass_of(row) else ""
        others = sorted({kind.name for kind in self._memory.kinds if not kind.selects})
        but = f", but for {' and '.join(others)} layers" if others else ""
        line = (
            f"FreeKV request: {num_prompt:,} + {num_new:,} tokens, of which a step attended to {up_to}{budget:,}{but} "
            f"({budget / len(slots):.0%} at the end)"
        )
        if self._memory.device == "cpu":
            line += f"; {self._on_device(slots[::page_size] // page_size)}"
        logger.info(line)

    def _on_device(self, pages: torch.Tensor) -> str:
        totals = Counter(self._memory.counters.as_dict())
        since = Counter({name: total - self._told[name] for name, total in totals.items()})
        self._told = totals
        share = self._memory.blocks.resident_share(pages)
        flagged = since["flagged_rows"] / max(1, since["rows"])
        recalled = since["recalled_bytes"] / max(1, since["decoded_tokens"])
        return (
            f"{share:.0%} of its KV on the device at the end. Since the last such line {flagged:.0%} of rows "
            f"were corrected, {in_words(recalled)} recalled per token"
        )
