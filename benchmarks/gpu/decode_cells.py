"""What the decode phases measure, in the order of its worth: later cells are left out when the time is over."""

from __future__ import annotations

from dataclasses import dataclass

K = 1024
TARGETS_MB = (13, 26, 48)  # recalled per request and step, at 32K and batch 8
STEP_CELLS = ((8, 32 * K), (1, 128 * K), (1, 32 * K), (32, 32 * K))  # batch, context: of phase layer, and predicted
# Cell -> what is hoped for of its step: at most so many times window-only, at least so many times faster than full.
MOST_OF_WINDOW, LEAST_OF_FULL = {(8, 32 * K): 1.10}, {(1, 128 * K): 1.6, (32, 32 * K): 3.5}
REHEARSED_STEP_CELLS = ((1, 320),)
WINDOWS = 3  # device blocks of a request, in windows; two are the least
SPECULATION, DEFAULT, EXACT = -1.0, 0.9, 2.0  # tau
# Of phase layer: mean of 1 - cosine of two steps' queries. With random keys and the default budget at 32K, MOVING
# corrects and exchanges about as much as the default rule does on a language model; STILL nothing.
STILL, MOVING = 0.0, 0.11


@dataclass(frozen=True)
class Cell:
    """One number of FreeKV. `windows` 0: blocks for every page."""

    context: int
    batch: int
    tau: float = DEFAULT
    target_mb: int = TARGETS_MB[1]  # 0: queries do not drift, nearly nothing is recalled
    windows: float = WINDOWS


# Batch 23: what the host store of a 128 GiB machine holds at 32K. The goals' cells first.
FREEKV_CELLS = (
    *(Cell(32 * K, 8, target_mb=mb) for mb in TARGETS_MB),
    Cell(32 * K, 8, target_mb=0),
    *(Cell(32 * K, 23, target_mb=mb) for mb in TARGETS_MB),
    Cell(32 * K, 1),
    Cell(32 * K, 1, windows=0),
    Cell(128 * K, 1),
    Cell(32 * K, 4),
    Cell(32 * K, 4, EXACT),
    Cell(32 * K, 8, SPECULATION),
    Cell(32 * K, 8, SPECULATION, 0),
    Cell(32 * K, 8, EXACT),
    Cell(32 * K, 8, windows=2),
    Cell(32 * K, 32),
    Cell(128 * K, 8),
    Cell(8 * K, 8),
    Cell(8 * K, 1),
    Cell(8 * K, 32),
    Cell(128 * K, 32),
    Cell(32 * K, 32, SPECULATION),
    Cell(32 * K, 32, EXACT),
    Cell(32 * K, 1, EXACT),
    Cell(128 * K, 8, EXACT),
)
# Context 2048 is what FreeKV attends to: the ideal of its step. At 32K, 5 requests fit 24 GB.
PLAIN_CELLS = (
    *((32 * K, batch) for batch in (1, 8, 23, 5, 4)),
    *((2 * K, batch) for batch in (1, 8, 23, 4, 32)),
    *((128 * K, 1), (32 * K, 32), (128 * K, 8), (8 * K, 8), (8 * K, 1), (8 * K, 32), (128 * K, 32)),
)
REHEARSED_PLAIN = ((512, 2), (2048, 2))
REHEARSED_FREEKV = (Cell(512, 2), Cell(512, 2, EXACT, 0, 2), Cell(2048, 3, SPECULATION, windows=0))
