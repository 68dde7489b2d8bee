"""What the engine counts; no logic."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """Totals since start-up, over all layers. A row is one (request, KV head) of one layer and step."""

    steps: int = 0  # decode steps
    decoded_tokens: int = 0
    rows: int = 0  # rows of requests over their budget, dense layers excluded
    flagged_rows: int = 0  # of those, rows whose query had moved: corrected before attention
    hits: int = 0  # selected (page, head) pairs that were resident
    misses: int = 0  # selected pairs that were recalled
    demand_misses: int = 0  # pairs of a front window that had lost their block since it was written
    recalled_bytes: int = 0
    absent_pages: int = 0  # window entries without a block when attention ran: must stay 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
