"""One process with one model: the full attention that everything is compared with, or retrieval by several methods.

Methods whose selectors read the same page index share a process and so the texts' prefill: a method is a setting of the
memory and an engine built over it, as at the start of a server, with as many device blocks as its budget needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from benchmarks.real_model.compare import Comparison, compare
from benchmarks.real_model.job import Cell, Job, Work
from benchmarks.real_model.probe import Probe
from sglang_freekv.algorithm.engine import build_engine
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.flags import add_cli_args, take_options
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.page_indexes import index_of


def read_full(job: Job) -> Iterator[Work]:
    """Decode with plain SGLang and keep its log-probabilities; yields the work done since the last time."""
    runner, reading = start(job)
    yield from reading.prefill()
    vocabulary = runner.model_config.vocab_size
    for context in job.contexts:
        shape = (job.num_steps, len(job.texts), vocabulary)
        kept = np.lib.format.open_memmap(job.log_probabilities(context), mode="w+", dtype=np.float32, shape=shape)
        for step, logits in enumerate(reading.decode(context)):
            kept[step] = logits[:, :vocabulary].float().log_softmax(-1).cpu().numpy()
            yield Work(decoded=len(job.texts))
        kept.flush()


def read_methods(job: Job, cells: Sequence[Cell]) -> Iterator[Work | Comparison]:
    """Decode with each cell's method; yields the work, and the comparison of each cell.

    The first method's selector must read an index that serves all of them.
    """
    configs = [config_of(cell) for cell in cells]
    widest = max(config.budget_tokens for config in configs)
    runner, reading = start(job, kv_retrieval="freekv", freekv_budget=widest, freekv_selector=configs[0].selector_name)
    yield from reading.prefill()
    for (method, context, _), config in zip(cells, configs, strict=True):
        full = np.load(job.log_probabilities(context), mmap_mode="r")
        memory, probe = start_method(runner, config, job), Probe(runner.attn_backend.decode, job.every)
        predictions = []
        for step, logits in enumerate(reading.decode(context)):
            predictions.append(compare(torch.from_numpy(full[step].copy()), logits, reading.targets(context, step)))
            yield Work(decoded=len(job.texts))
        yield Comparison.of(method.name, context, predictions, probe.steps, memory)


def config_of(cell: Cell) -> FreeKVConfig:
    """The settings that its method's flags give, with its budget."""
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    flags = ["--kv-retrieval", "freekv", "--freekv-budget", str(cell.budget), *cell.method.flags]
    return take_options(vars(parser.parse_args(flags)))[0]


def share_processes(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that can share a process, the one whose index serves all of them first."""
    indexes = {cell: index_of(config_of(cell)) for cell in cells}
    shared: list[list[Cell]] = []
    # A subclass has what its base has.
    for cell in sorted(cells, key=lambda cell: -len(indexes[cell].__mro__)):
        for group in shared:
            if issubclass(indexes[group[0]], indexes[cell]):
                group.append(cell)
                break
        else:
            shared.append([cell])
    return shared


def start(job: Job, **keywords: object):
    """A runner whose pool holds the texts, and the texts."""
    # SGLang is loaded in the processes that need it, after what it prints is redirected.
    from benchmarks.real_model.reading import Reading
    from benchmarks.runner import load_runner

    runner = load_runner(
        job.model,
        job.device,
        dtype=job.dtype,
        log_level="error",
        page_size=FreeKVConfig.page_size,
        max_running_requests=len(job.texts),
        max_total_tokens=job.num_slots,
        **keywords,
    )
    return runner, Reading(runner, job)


def start_method(runner, config: FreeKVConfig, job: Job) -> KVMemory:
    """A memory and an engine as at the start of a server, over the host store and index as they are."""
    memory = runner.attn_backend.memory
    num_texts, num_kv_heads = len(job.texts), memory.geometry.num_kv_heads
    wanted = int(job.windows * num_texts * (config.budget_tokens // config.page_size)) * num_kv_heads
    memory.start(config, min(wanted, memory.host.num_host_pages * num_kv_heads))
    for row in range(1, num_texts + 1):
        memory.admit(row)
    runner.attn_backend.decode, runner.attn_backend.prefill = build_engine(memory)
    return memory
