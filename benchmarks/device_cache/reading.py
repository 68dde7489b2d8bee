"""A real model's decode steps, as the device cache sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.real_model.job import Cell, Job, Work
from benchmarks.real_model.worker import config_of, start, start_method


class Steps(NamedTuple):
    """All decode steps of a cell with so many windows of device blocks for each text."""

    cell: Cell
    windows: float
    width: int  # pages of a window
    counts: np.ndarray  # int64 [num_steps, len(Count)], of each step


def read_steps(job: Job, cells: Sequence[Cell], windows: Sequence[float]) -> Iterator[Work | Steps]:
    """Decode the job's texts with each cell and each number of windows.

    The first method's selector must read an index that serves all of them.
    """
    first, widest = config_of(cells[0]), max(cell.budget for cell in cells)
    runner, reading = start(job, kv_retrieval="freekv", freekv_budget=widest, freekv_selector=first.selector_name)
    yield from reading.prefill()
    for cell in cells:
        for number in windows:
            memory = start_method(runner, config_of(cell), dataclasses.replace(job, windows=number))
            counts = [memory.counters.values.tolist() for _ in reading.decode(cell.context)]
            yield Steps(cell, number, memory.sizes.budget, np.diff(np.array(counts), axis=0, prepend=0))
