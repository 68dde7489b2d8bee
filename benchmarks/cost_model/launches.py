"""What a layer of a decode step launches, and how much its kernels execute: counted in the engine and in compiled code.

Tests hold the counts against both (tests/kernels/test_compile.py, tests/benchmarks/test_gpu_step.py), in the shape of
Llama-3.1-8B with pages of 32 tokens and 2 bits per key element. Seconds are assumed; stage 0 of the GPU suite measures.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from benchmarks.cost_model.cards import Card

# Of any step: sampling and what lies between two graphs. Of any layer: a dozen small kernels around attention.
STEP_S, LAYER_S = 250e-6, 15e-6


class Launches(NamedTuple):
    """Ops of one layer, in order."""

    front: tuple[str, ...]  # attention waits for them
    scan: tuple[str, ...]  # beside what follows
    fetch: tuple[str, ...]  # beside what follows, after the scan

    def with_candidates(self) -> Launches:
        """The same with a first level, which lists what is scored."""
        return Launches(*(_with_lists(ops) for ops in self))


def _with_lists(ops: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(one for op in ops for one in (("list_candidates", op) if op == "score_pages" else (op,)))


# By what corrects: what the next step needs, whose scan is in front then, or, by codes, the cosine of two queries.
GATE = Launches(
    front=("append_tokens", "score_pages", "correct_windows", "fetch_blocks"),
    scan=(),
    fetch=("fetch_blocks",),
)
COSINE = Launches(
    front=("append_tokens", "score_pages", "select_pages", "fetch_blocks"),
    scan=("score_pages", "select_pages"),
    fetch=("fetch_blocks",),
)
# What plain SGLang launches in the place of these: its own op that stores a token's keys and values.
REPLACED = 1

# Kernels of an op, where they are not one.
KERNELS = {"list_candidates": 2}
KERNEL_S = 2e-6  # from one kernel's last program to the first of the next one in a graph, with nothing to do
# What an op takes beyond that whatever its size: reads that wait for each other, or writes across the link.
OWN_S = {"append_tokens": 1.5e-6, "score_pages": 1e-6, "fetch_blocks": 3e-6}


class RowKernel(NamedTuple):
    """A kernel with one program per row, which looks at blocks of columns one after the other."""

    instructions: int  # of a warp, in the whole kernel
    in_loops: int  # of these in the innermost loops, which each block of columns runs
    warps: int
    registers: int


BLOCK_COLUMNS = 1024
# A warp instruction waits for the one before it, as few warps share a scheduler: some 5 cycles, assumed.
CYCLES_PER_INSTRUCTION = 5
# Of the four that a multiprocessor issues per clock, what a kernel gets that holds two warps per scheduler; assumed.
ISSUE_SHARE = 0.7
COMPILER = "3.6"  # Triton's version, whose kernels are counted here
# Compute capability -> warp instructions of scoring a page and KV head by codes, with its mass.
SCORE_INSTRUCTIONS = {80: 952, 90: 416}
CORRECT = {80: RowKernel(2616, 1502, 8, 96), 90: RowKernel(2640, 1505, 8, 120)}
_REGISTERS, _WARPS = 65536, 64  # of a multiprocessor


def launch_seconds(ops: tuple[str, ...]) -> float:
    """What ops in a row take whatever their sizes."""
    return sum(KERNELS.get(op, 1) * KERNEL_S + OWN_S.get(op, 0.0) for op in ops)


def fixed_seconds(ops: Launches) -> float:
    """What a layer's ops in front of attention take whatever their sizes, beyond those of plain SGLang."""
    return launch_seconds(ops.front) - REPLACED * KERNEL_S


def pages_per_second(card: Card) -> float:
    """Pages and KV heads that are scored by codes, if memory does not bound it."""
    issued = 4 * card.num_sms * card.clock_ghz * 1e9 * ISSUE_SHARE
    return issued / SCORE_INSTRUCTIONS[_counted(SCORE_INSTRUCTIONS, card)]


def rows_seconds(card: Card, rows: float, columns: int) -> float:
    """Share, judge and select some rows, a program each; as many run at once as their registers let."""
    kernel = CORRECT[_counted(CORRECT, card)]
    registers = 8 * ceil(kernel.registers / 8) * 32 * kernel.warps
    at_once = card.num_sms * min(_REGISTERS // registers, _WARPS // kernel.warps)
    instructions = kernel.instructions + (ceil(columns / BLOCK_COLUMNS) - 1) * kernel.in_loops
    return ceil(rows / at_once) * instructions * CYCLES_PER_INSTRUCTION / (card.clock_ghz * 1e9)


def _counted(counts: dict[int, object], card: Card) -> int:
    """The newest compute capability that is counted and not newer than the card."""
    return max(capability for capability in counts if capability <= card.capability)
