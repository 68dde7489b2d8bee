"""One process with one model: the full attention that everything is compared with, or retrieval by several methods.

Methods whose selectors read the same page index share a process and so the texts' prefill: a method is a setting of the
memory and an engine built over it, as at the start of a server, with as many device blocks as its budget needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.methods import Method
from benchmarks.real_model.compare import Comparison, compare
from benchmarks.real_model.probe import Probe
from benchmarks.real_model.reading import PAGE, Reading, Work, num_slots
from benchmarks.runner import load_runner
from sglang_freekv.algorithm.engine import build_engine
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.flags import add_cli_args, take_options
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.page_indexes import INDEXES


@dataclass(frozen=True)
class Job:
    """What all processes of a run share."""

    model: str
    dtype: str
    device: str
    texts: tuple[tuple[int, ...], ...]
    contexts: tuple[int, ...]
    num_steps: int
    every: int  # steps of which one looks at exact attention
    windows: float  # of device blocks per request
    folder: Path  # of the logits of full attention

    @property
    def num_tokens(self) -> int:
        """Of a text: the longest context, and what is decoded behind it."""
        return max(self.contexts) + self.num_steps + 1

    def logits(self, context: int) -> Path:
        return self.folder / f"full-{context}.npy"


class Cell(NamedTuple):
    """A method with a budget in tokens."""

    method: Method
    budget: int


def read_full(job: Job) -> Iterator[Work]:
    """Decode with plain SGLang and keep its log-probabilities; yields the work done since the last time."""
    runner = _load(job)
    reading = Reading(runner, job.texts, job.num_steps)
    yield from reading.prefill()
    vocabulary = runner.model_config.vocab_size
    for context in job.contexts:
        shape = (job.num_steps, len(job.texts), vocabulary)
        kept = np.lib.format.open_memmap(job.logits(context), mode="w+", dtype=np.float32, shape=shape)
        for step, logits in enumerate(reading.decode(context)):
            kept[step] = logits[:, :vocabulary].float().log_softmax(-1).cpu().numpy()
            yield Work(decoded=len(job.texts))
        kept.flush()


def read_methods(job: Job, cells: Sequence[Cell]) -> Iterator[Work | Comparison]:
    """Decode with each (method, budget) behind each context; yields the work, and the comparison of each.

    The first method's selector must read an index that serves all of them.
    """
    configs = [config_of(method, budget) for method, budget in cells]
    widest = max(config.budget_tokens for config in configs)
    runner = _load(job, kv_retrieval="freekv", freekv_budget=widest, freekv_selector=configs[0].selector_name)
    reading = Reading(runner, job.texts, job.num_steps)
    yield from reading.prefill()
    for context in job.contexts:
        full = np.load(job.logits(context), mmap_mode="r")
        for (method, _), config in zip(cells, configs, strict=True):
            memory, probe = _start_method(runner, config, job), Probe(runner.attn_backend.decode, job.every)
            predictions, resident = [], []
            for step, logits in enumerate(reading.decode(context)):
                predictions.append(compare(torch.from_numpy(full[step].copy()), logits, reading.targets(context, step)))
                resident.append(memory.blocks.num_resident)
                yield Work(decoded=len(job.texts))
            yield Comparison.of(method.name, context, predictions, probe.steps, resident, memory)


def config_of(method: Method, budget: int) -> FreeKVConfig:
    """The settings that a method's flags give, with a budget in tokens."""
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    recent = ("--freekv-recent", str(budget - FreeKVConfig.sink_tokens)) if method.is_window else ()
    flags = ["--kv-retrieval", "freekv", "--freekv-budget", str(budget), *recent, *method.flags]
    return take_options(vars(parser.parse_args(flags)))[0]


def share_processes(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that can share a process, the one whose index serves all of them first."""
    indexes = {cell: INDEXES[config_of(*cell).selector_name] for cell in cells}
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


def _load(job: Job, **keywords: object):
    """A runner whose pool holds the texts."""
    return load_runner(
        job.model,
        job.device,
        dtype=job.dtype,
        log_level="error",
        page_size=FreeKVConfig.page_size,
        max_running_requests=len(job.texts),
        max_total_tokens=num_slots(len(job.texts), job.num_tokens, job.num_steps) + PAGE,
        **keywords,
    )


def _start_method(runner, config: FreeKVConfig, job: Job) -> KVMemory:
    """A memory and an engine as at the start of a server, over the host store and index as they are."""
    memory = runner.attn_backend.memory
    num_texts, num_kv_heads = len(job.texts), memory.geometry.num_kv_heads
    wanted = int(job.windows * num_texts * (config.budget_tokens // config.page_size)) * num_kv_heads
    memory.start(config, min(wanted, memory.host.num_host_pages * num_kv_heads))
    for row in range(1, num_texts + 1):
        memory.admit(row)
    runner.attn_backend.decode, runner.attn_backend.prefill = build_engine(memory)
    return memory
