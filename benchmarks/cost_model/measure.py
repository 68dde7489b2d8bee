"""Measure rates, or the steps of one engine, in a process of its own, as SGLang has one runner per process.

    python -m benchmarks.cost_model.measure {rates,plain,freekv} --out FILE

appends JSON lines that `benchmarks.cost_model` reads. Steps are SGLang's own runner's, in graphs on a GPU: see
`benchmarks.gpu.decode_step`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.cost_model.cells import Cell, cells, shape_for
from freekv_kernels import Count
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.pinned import free_host_bytes
from sglang_freekv.memory.units import GIB

_CPU_STEPS = 2, 7  # to warm up, and timed
_MOST_STEPS = 48  # of a cell, on any device
_SPARE_PAGES = 64
_HOST_SHARE = 0.8  # of what is free


def measure_plain(device: str, wanted: list[Cell], folder: Path) -> Iterator[dict]:
    from benchmarks.gpu.decode_model import capture, load_dummy
    from benchmarks.gpu.decode_requests import make_requests
    from benchmarks.gpu.decode_step import step_times

    model = shape_for(device).write(folder)
    on_cpu = {"max_total_tokens": _tokens(wanted), "mem_fraction_static": 0.8}
    sizes = on_cpu if device == "cpu" else {"mem_fraction_static": 0.88} | _graph_flags(wanted)
    runner = load_dummy(model, device, max_running_requests=_most(wanted), **sizes)
    pool = runner.token_to_kv_pool
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.normal_()
    num_pages = runner.max_total_num_tokens // 32 - 1
    for cell in wanted:
        if cell.context + _MOST_STEPS > num_pages * 32:
            print(f"left out, does not fit: {cell}", flush=True)
            continue
        capture(runner, cell.batch)
        requests = make_requests(runner, cell.batch, cell.context, _MOST_STEPS, num_pages)
        yield _sample(cell, step_times(requests, cpu_steps=_CPU_STEPS))


def measure_freekv(device: str, wanted: list[Cell], folder: Path) -> Iterator[dict]:
    from benchmarks.gpu.decode_model import load_dummy
    from benchmarks.gpu.decode_requests import fill_host_store

    shape = shape_for(device)
    host_bytes = _tokens(wanted) * shape.geometry().token_bytes
    runner = load_dummy(
        shape.write(folder),
        device,
        max_running_requests=_most(wanted),
        kv_retrieval="freekv",
        freekv_budget=min(cell.budget for cell in wanted),
        freekv_max_budget=max(cell.budget for cell in wanted),
        freekv_host_memory=min(host_bytes, _HOST_SHARE * free_host_bytes()) / GIB,
        freekv_device_blocks_memory=0.1 if device == "cpu" else 8.0,  # replaced in each cell
        **({} if device == "cpu" else {"mem_fraction_static": 0.88} | _graph_flags(wanted)),
    )
    memory = runner.token_to_kv_pool.memory
    try:
        fill_host_store(memory)
        for cell in wanted:
            try:
                yield _freekv_sample(runner, memory, cell)
            except torch.OutOfMemoryError as error:
                print(f"left out, does not fit: {cell}: {str(error).splitlines()[0]}", flush=True)
    finally:
        memory.unpin()


def _freekv_sample(runner, memory: KVMemory, cell: Cell) -> dict:
    """Measure one cell, with blocks, budget, tau and drift of its own."""
    from benchmarks.gpu.decode_model import capture, set_drift
    from benchmarks.gpu.decode_requests import give_first_windows, make_requests, restart
    from benchmarks.gpu.decode_step import step_times

    g, num_pages = memory.geometry, memory.host.num_host_pages
    sizes = {"budget_tokens": cell.budget, "max_budget_tokens": cell.budget}
    config = dataclasses.replace(memory.config, selector=cell.selector, tau=cell.tau, **sizes)
    set_drift(runner, g, cell.drift)
    num_pairs = num_pages * g.num_kv_heads
    num_blocks = int(cell.windows * cell.batch * cell.budget // g.page_size * g.num_kv_heads)
    restart(memory, config, min(num_blocks, num_pairs) if cell.windows else num_pairs)
    capture(runner, cell.batch)
    requests = make_requests(runner, cell.batch, cell.context, _MOST_STEPS, num_pages - 1)
    give_first_windows(requests)
    before: list[int] = []
    seconds = step_times(requests, lambda: before.extend(memory.counters.values.tolist()), _CPU_STEPS)
    count = {c: memory.counters[c] - before[c] for c in Count}
    if count[Count.ABSENT_PAGES]:
        raise RuntimeError(f"{count[Count.ABSENT_PAGES]} pages were absent when attention ran, in {cell}")
    return _sample(
        cell,
        seconds,
        flagged=count[Count.FLAGGED_ROWS] / max(1, count[Count.ROWS]),
        recalled_bytes=count[Count.RECALLS] * g.record_bytes / len(seconds) / cell.batch,
        shares_pages=int(requests.shares_pages),
    )


def _tokens(wanted: list[Cell]) -> int:
    """That hold the largest cell."""
    return max(cell.batch * (cell.context + 2 * _MOST_STEPS) for cell in wanted) + _SPARE_PAGES * 32


def _most(wanted: list[Cell]) -> int:
    return max(cell.batch for cell in wanted)


def _graph_flags(wanted: list[Cell]) -> dict:
    return {"cuda_graph_bs_decode": [_most(wanted)], "disable_prefill_cuda_graph": True}


def _sample(cell: Cell, seconds: list[float], **counted: float) -> dict:
    ordered = sorted(seconds)
    times = {"p20": ordered[len(ordered) // 5], "p80": ordered[len(ordered) * 4 // 5]}
    print(f"{cell}: {statistics.median(ordered) * 1e3:.2f} ms", flush=True)
    return {"cell": dataclasses.asdict(cell), "seconds": statistics.median(ordered), **times, **counted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("rates", "plain", "freekv"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with args.out.open("a") as file, tempfile.TemporaryDirectory() as folder:
        if args.what == "rates":
            from benchmarks.cost_model.rates import measure_rates

            found = [measure_rates(device, shape_for(device).geometry())]
        else:
            measure = measure_plain if args.what == "plain" else measure_freekv
            found = measure(device, cells(args.what, device), Path(folder) / "model")
        for sample in found:
            file.write(json.dumps(sample) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
