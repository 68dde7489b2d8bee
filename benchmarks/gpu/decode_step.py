"""Phases decode-plain and decode-freekv: time of a decode step of a whole model, in SGLang's runner with CUDA graphs.

A step's time is that from one launch of a step to the next on the GPU, with the host running ahead as in SGLang's
overlapped scheduler: whatever the host or the plan of a step costs beyond the GPU's work is in it. Sampling is not.
With every number stands what decides it: the share of corrected rows and the bytes recalled per request and step.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from benchmarks.gpu.decode_cells import FREEKV_CELLS, PLAIN_CELLS, REHEARSED_FREEKV, REHEARSED_PLAIN, Cell, K
from benchmarks.gpu.decode_model import capture, load_dummy, set_drift
from benchmarks.gpu.decode_requests import Requests, fill_host_store, give_first_windows, make_requests, restart
from benchmarks.gpu.session import Failures, Session
from freekv_kernels import Count
from sglang_freekv.memory.geometry import num_pages_of
from sglang_freekv.memory.pinned import free_host_bytes
from sglang_freekv.memory.units import GIB

_WARM_UP, _STEPS = 8, 32
_CAP_BYTES = 24e9  # of device memory for KV, where it is capped
_HOST_SHARE = 0.8  # of what is free
# Of 32K: what the goals' cells need. To pin and fill what the largest batch has takes the time of several cells; larger
# batches share pages, and their records say so.
_STORED_REQUESTS = 8
_CELL_SECONDS = 15  # of FreeKV: a calibration, or a cell and then to unpin the host store
_CALIBRATION_STEPS, _CALIBRATIONS = 12, 7


def run_plain(session: Session) -> None:
    cells = REHEARSED_PLAIN if session.is_rehearsal else PLAIN_CELLS
    sizes = {"max_total_tokens": 4096} if session.is_rehearsal else {"mem_fraction_static": 0.88}
    runner = _load(session, max_running_requests=max(batch for _, batch in cells), **sizes)
    pool = runner.token_to_kv_pool
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.normal_()
    num_pages = runner.max_total_num_tokens // 32 - 1
    session.record("plain_pool", runner.max_total_num_tokens, "tokens")
    failures = Failures(session)
    for context, batch in cells:
        if not session.has_time(3, f"plain, {context} tokens, batch {batch}"):
            continue
        with failures.kept(f"plain, {context} tokens, batch {batch}"):
            capture(runner, batch)
            requests = make_requests(runner, batch, context, _WARM_UP + _STEPS, num_pages)
            about = {"shares_pages": int(requests.shares_pages)}
            about["attention_backend"] = str(runner.server_args.attention_backend)
            _record_step(session, step_times(requests), "plain", context, batch, **about)
    # How many requests fit, with the KV capped, is arithmetic; their step is a cell above.
    capped = int(_CAP_BYTES // (32 * K * session.shape.geometry().token_bytes))
    session.record("capped_batch", capped, "requests", mode="plain", context=32 * K)
    failures.raise_first()


def run_freekv(session: Session) -> None:
    bench = FreeKVBench(session)
    try:
        bench.run(REHEARSED_FREEKV if session.is_rehearsal else FREEKV_CELLS)
    finally:
        bench.memory.unpin()


class FreeKVBench:
    """One process with one host store; blocks, tau and drift change from cell to cell."""

    def __init__(self, session: Session) -> None:
        self.session = session
        g = session.shape.geometry()
        cells = REHEARSED_FREEKV if session.is_rehearsal else FREEKV_CELLS
        wanted = (_STORED_REQUESTS * (32 * K + 128) + 64) * g.token_bytes
        host_bytes = (64 << 20) if session.is_rehearsal else min(wanted, _HOST_SHARE * free_host_bytes())
        sizes = {"freekv_budget": 320} if session.is_rehearsal else {"mem_fraction_static": 0.88}
        start = time.perf_counter()
        self.runner = _load(
            session,
            max_running_requests=max(cell.batch for cell in cells),
            kv_retrieval="freekv",
            freekv_host_memory=host_bytes / GIB,
            # Replaced in each cell.
            freekv_device_blocks_memory=0.1 if session.is_rehearsal else 20.0,
            **sizes,
        )
        self.memory = self.runner.token_to_kv_pool.memory
        session.record("freekv_start", time.perf_counter() - start, "s", host_gib=round(host_bytes / GIB, 1))
        start = time.perf_counter()
        fill_host_store(self.memory)
        _synchronize(session)
        session.record("host_fill_rate", host_bytes / GIB / (time.perf_counter() - start), "GiB/s")
        self.drifts = {0: 1e-6}

    def run(self, cells: tuple[Cell, ...]) -> None:
        session, failures = self.session, Failures(self.session)
        for cell in cells:
            described = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(cell).items())
            if not session.has_time(_CELL_SECONDS, described):
                continue
            with failures.kept(described):
                if cell.target_mb not in self.drifts:
                    self._calibrate(cell.target_mb)
                self._measure(cell)
        failures.raise_first()

    def _prepare(self, cell: Cell, drift: float) -> None:
        """Weights, blocks, tau and graph of a cell."""
        g, memory = self.memory.geometry, self.memory
        set_drift(self.runner, g, drift)
        config = dataclasses.replace(memory.config, tau=cell.tau)
        per_request = cell.windows * memory.sizes.max_budget  # pages
        if not cell.windows:
            per_request = num_pages_of(cell.context + _WARM_UP + _STEPS, g.page_size) + 1
        num_blocks = int(cell.batch * per_request) * g.num_kv_heads
        restart(memory, config, min(num_blocks, memory.host.num_host_pages * g.num_kv_heads))
        capture(self.runner, cell.batch)

    def _start(self, cell: Cell, max_steps: int) -> Requests:
        num_pages = self.memory.host.num_host_pages - 1
        requests = make_requests(self.runner, cell.batch, cell.context, max_steps, num_pages)
        give_first_windows(requests)
        return requests

    def _calibrate(self, target_mb: int) -> None:
        """Find the drift at which a step recalls `target_mb` per request, by bisection; traffic grows with drift."""
        session = self.session
        cell = Cell(512, 2) if session.is_rehearsal else Cell(32 * K, 8)
        low, high, found = 1e-4, 1.0, []
        self._prepare(cell, low)
        for _ in range(2 if session.is_rehearsal else _CALIBRATIONS):
            drift = (low * high) ** 0.5
            set_drift(self.runner, self.memory.geometry, drift)
            before, steps = self._run_steps(cell, _CALIBRATION_STEPS)
            recalled = self._recalled_mb(before, steps, cell)
            found.append((abs(recalled - target_mb), drift))
            session.record(
                "calibration", recalled, "MB", target_mb=target_mb, drift=drift, flagged=self._flagged(before)
            )
            low, high = (drift, high) if recalled < target_mb else (low, drift)
        self.drifts[target_mb] = min(found)[1]

    def _run_steps(self, cell: Cell, steps: int) -> tuple[list[int], int]:
        """Decode a new batch; the counters as they were after half of the steps, and the steps since."""
        requests = self._start(cell, steps)
        for _ in range(steps // 2):
            requests.step()
        before = self.memory.counters.values.tolist()
        for _ in range(steps - steps // 2):
            requests.step()
        return before, steps - steps // 2

    def _measure(self, cell: Cell) -> None:
        session, memory = self.session, self.memory
        self._prepare(cell, self.drifts[cell.target_mb])
        requests = self._start(cell, _WARM_UP + _STEPS)
        counters: list[list[int]] = []
        times = step_times(requests, lambda: counters.append(memory.counters.values.tolist()))
        before, steps = counters[0], len(times) - 1
        counted = {c.name.lower(): memory.counters[c] - before[c] for c in Count}
        session.check("no page was absent", counted["absent_pages"] == 0, f"{cell}")
        device_bytes = memory.device_bytes()
        _record_step(
            session,
            times[1:],
            "freekv",
            **dataclasses.asdict(cell),
            shares_pages=int(requests.shares_pages),
            flagged=self._flagged(before),
            recalled_mb=round(self._recalled_mb(before, len(times), cell), 2),
            demand_misses=counted["demand_misses"],
            hit_share=round(counted["hits"] / max(1, counted["hits"] + counted["misses"]), 4),
            drift=self.drifts[cell.target_mb],
            kv_gbytes=round(sum(device_bytes.values()) / 1e9, 2),
            steps=steps,
        )

    def _recalled_mb(self, before: list[int], steps: int, cell: Cell) -> float:
        recalls = self.memory.counters[Count.RECALLS] - before[Count.RECALLS]
        return recalls * self.memory.geometry.record_bytes / steps / cell.batch / 1e6

    def _flagged(self, before: list[int]) -> float:
        rows, flagged = (self.memory.counters[c] - before[c] for c in (Count.ROWS, Count.FLAGGED_ROWS))
        return round(flagged / max(1, rows), 4)


def _load(session: Session, **keywords: object):
    model = session.shape.write(session.out / "models" / session.shape_name)
    if session.device == "cuda":
        # Captured again in each cell, one size each; buffers that all of them share are made for the largest one here.
        keywords |= {"cuda_graph_bs_decode": [keywords["max_running_requests"]], "disable_prefill_cuda_graph": True}
    return load_dummy(model, session.device, **keywords)


def step_times(
    requests: Requests, after_warm_up: Callable[[], object] = lambda: None, cpu_steps: tuple[int, int] = (1, 3)
) -> list[float]:
    """Seconds of each step after the warm-up; `cpu_steps` of warm-up and after it, where there is no GPU."""
    num_warm_up, num_steps = (_WARM_UP, _STEPS) if requests.rows.is_cuda else cpu_steps
    for _ in range(num_warm_up):
        requests.step()
    after_warm_up()
    if not requests.rows.is_cuda:
        marks = [time.perf_counter()]
        for _ in range(num_steps):
            requests.step()
            marks.append(time.perf_counter())
        return [b - a for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    events[0].record()
    for event in events[1:]:
        requests.step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def _record_step(session: Session, times: list[float], mode: str, context: int, batch: int, **params) -> None:
    median = statistics.median(times)
    sizes = {"mode": mode, "context": context, "batch": batch, **params}
    ordered = sorted(times)
    p20, p80 = ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5]
    session.record(
        "decode_step", round(median * 1e3, 4), "ms", **sizes, p20=round(p20 * 1e3, 4), p80=round(p80 * 1e3, 4)
    )
    session.record("decode_throughput", round(batch / median, 1), "tokens/s", shown=False, **sizes)


def _synchronize(session: Session) -> None:
    if session.device == "cuda":
        torch.cuda.synchronize()
