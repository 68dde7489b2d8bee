"""Phase layer: what a layer of a decode step takes with the engine, with window and with full attention; so a step.

The engine's own plan, ops and streams in a CUDA graph, between the matrix products of a layer of 8B; attention is a
stand-in, the same for all three. A layer is the difference of two graphs of different depth; a step is that times the
layers of the model, with its plan and its tail: the logits, and what is left beside them. Keys and queries are random,
and queries move by a chosen amount between steps, so that beside each number stands how much was corrected and
recalled. Sampling is not in it, nor what the host takes.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from benchmarks.gpu.decode_cells import MOVING, REHEARSED_STEP_CELLS, STEP_CELLS, STILL
from benchmarks.gpu.engine_stack import EngineStack
from benchmarks.gpu.layer_work import LayerWork, attend_blocks, plain_layer
from benchmarks.gpu.predict import record_explained
from benchmarks.gpu.session import Failures, Session
from benchmarks.gpu.timing import Stopwatch
from sglang_freekv.algorithm.audit import audit_blocks, audit_windows
from sglang_freekv.config import FreeKVConfig

WARM_UP_STEPS = 2
_AUDITED_BATCH = 8  # an audit reads every block over the link


class Sizes(NamedTuple):
    """How much is measured."""

    cells: tuple[tuple[int, int], ...]  # batch, context
    depths: tuple[int, int]  # layers of the two graphs
    steps: int


_SIZES = Sizes(STEP_CELLS, (2, 4), 24)
_REHEARSED = Sizes(REHEARSED_STEP_CELLS, (1, 2), 1)


def run(session: Session) -> None:
    sizes, failures, stopwatch = _REHEARSED if session.is_rehearsal else _SIZES, Failures(session), None
    for batch_size, context in sizes.cells:
        if not session.has_time(8, f"batch {batch_size}, context {context}"):
            break
        with failures.kept(f"batch {batch_size}, context {context}"), torch.no_grad():
            stopwatch = stopwatch or Stopwatch(session.device)
            work = LayerWork(session.shape, batch_size, session.device)
            logits = stopwatch.slope(work.compute_logits).median
            window = min(context, session.config.budget_tokens)
            for mode, attended in (("full", context), ("window", window)):
                layer = stopwatch.slope(plain_layer(work, attend_blocks(session, batch_size, attended))).median
                cell = {"mode": mode, "batch": batch_size, "context": context}
                session.record("layer_time", round(layer * 1e6, 2), "us", **cell)
                _record_step(session, session.shape.layers * layer + logits, **cell)
            del work
            _measure_engine(session, sizes, batch_size, context)
    failures.raise_first()


def _measure_engine(session: Session, sizes: Sizes, batch_size: int, context: int) -> None:
    """The engine's layer and step, with queries that move and with such that do not."""
    deep = sizes.depths[1]
    stack = EngineStack(session, batch_size, context, deep, sizes.steps + WARM_UP_STEPS)
    for drift in (MOVING,) if session.is_rehearsal else (MOVING, STILL):
        if not session.has_time(2, f"batch {batch_size}, context {context}, drift {drift}"):
            break
        plan, layer, tail, counted = time_layer(stack, sizes.depths, sizes.steps, drift)
        cell = {"mode": "freekv", "batch": batch_size, "context": context, "moves": drift}
        found = traffic_of(stack, counted, sizes.steps, session.shape.layers / deep)
        session.record("layer_time", round(layer * 1e6, 2), "us", **cell, **found)
        session.record("plan_time", round(plan * 1e6, 2), "us", batch=batch_size, context=context, moves=drift)
        session.record("tail_time", round(tail * 1e6, 2), "us", batch=batch_size, context=context, moves=drift)
        _record_step(session, plan + session.shape.layers * layer + tail, **cell, **found)
        record_explained(session, batch_size, context, drift, found)
        audit(session, stack, f"batch {batch_size}, context {context}")
    stack.memory.unpin()


def time_layer(
    stack: EngineStack, depths: tuple[int, int], steps: int, drift: float, config: FreeKVConfig | None = None
) -> tuple[float, float, float, dict[str, int]]:
    """Median seconds of a step's plan, of a layer and of what follows the last one; what the deeper steps have counted.

    Parameters
    ----------
    depths : layers of two graphs, whose difference is the layers'
    config : FreeKVConfig, optional
        Instead of the one that the stack has had.
    """
    (_, few, _), (plan, many, counted) = (_time_steps(stack, depth, steps, drift, config) for depth in depths)
    layer = (many - few) / (depths[1] - depths[0])
    return plan, layer, few - depths[0] * layer, counted


def _time_steps(
    stack: EngineStack, depth: int, steps: int, drift: float, config: FreeKVConfig | None
) -> tuple[float, float, dict[str, int]]:
    """Median seconds of the plan of a step, and of its layers; what these steps have counted."""
    stack.start(config)
    graph = stack.capture(depth)  # the first step, which has another query than the windows, is not one of those timed
    before, times = stack.counts(), []
    for _ in range(steps):
        stack.move(drift)
        times.append(stack.time_step(graph, depth))
    plans, layers = zip(*times, strict=True)
    counted = {name: value - before[name] for name, value in stack.counts().items()}
    return statistics.median(plans), statistics.median(layers), counted


def traffic_of(stack: EngineStack, counted: dict[str, int], num_steps: int, scale: float) -> dict[str, float]:
    """What steps have corrected and recalled; bytes are of one request and step, of the whole model."""
    g = stack.memory.geometry
    recalled = counted["recalls"] * g.record_bytes * scale / (num_steps * stack.batch_size)
    return {
        "flagged": round(counted["flagged_rows"] / max(1, counted["rows"]), 4),
        "scored": round(counted["scored_rows"] / max(1, counted["rows"]), 4),
        "recalled_mb": round(recalled / 1e6, 2),
        "hit_share": round(counted["hits"] / max(1, counted["hits"] + counted["misses"]), 4),
    }


def _record_step(session: Session, seconds: float, **cell: int | float | str) -> None:
    session.record("step_estimate", round(seconds * 1e3, 4), "ms", **cell)


def audit(session: Session, stack: EngineStack, what: str) -> None:
    """Of the replays: every block equals its host page, every window is what the rule says, no page was absent."""
    if stack.batch_size > _AUDITED_BATCH:
        return
    try:
        audit_windows(stack.decode)
        audit_blocks(stack.memory)
        fault = ""
    except RuntimeError as error:
        fault = str(error)
    session.check(f"audit of replayed steps, {what}", not fault, fault)
