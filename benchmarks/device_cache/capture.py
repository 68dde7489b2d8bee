"""The windows that a real model selects, step by step: what the device cache of a long run is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.real_model.job import Cell, Job, Work
from benchmarks.real_model.processes import run_in_process
from benchmarks.real_model.worker import config_of, start, start_method


def capture(job: Job, cell: Cell) -> np.ndarray:
    """Decode the job's texts behind the cell's context and keep what each (layer, text, KV head) selects.

    Returns
    -------
    int16, ``[num_steps, num_rows, width]``
        Logical pages, ascending. The window of a step is selected with its query: the next step reads it.
    """
    return np.stack([found for found in run_in_process(_read_windows, job, cell) if not isinstance(found, Work)])


def _read_windows(job: Job, cell: Cell) -> Iterator[Work | np.ndarray]:
    config = config_of(cell)
    runner, reading = start(
        job, kv_retrieval="freekv", freekv_budget=cell.budget, freekv_selector=config.selector_name
    )
    yield from reading.prefill()
    memory = start_method(runner, config, job)
    rows = reading.rows
    for _ in reading.decode(cell.context):
        back = memory.windows.pages[(memory.counters.steps + 1) % 2]  # [num_layers, rows, num_kv_heads, width]
        yield back[:, rows].flatten(0, 2).to("cpu").numpy().astype(np.int16)
