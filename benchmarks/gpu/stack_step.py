"""Phase stack: a step of layers of 8B with the engine and FlashInfer, without SGLang; then what its settings change.

As phase `layer`, with the attention that is served: FlashInfer over windows for the engine and for window-only, and
over every token, in pages of one token as plain SGLang has them, for full attention. Each line of settings is the same
step with one of them changed, on the same host store, so that what a setting costs is the difference of two lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.gpu.attention import full_attention, window_attention
from benchmarks.gpu.decode_cells import MOVING, REHEARSED_STEP_CELLS, STEP_CELLS, STILL, K
from benchmarks.gpu.engine_stack import EngineStack
from benchmarks.gpu.layer_step import WARM_UP_STEPS, audit, time_layer, traffic_of
from benchmarks.gpu.layer_work import LayerWork, attend_blocks, plain_layer
from benchmarks.gpu.session import Failures, Session
from benchmarks.gpu.timing import Stopwatch
from sglang_freekv.config import FreeKVConfig

DEFAULT = "default"
# What is changed -> how; the most wanted first. All read the index of the default.
SETTINGS: dict[str, dict[str, object]] = {
    "never corrected": {"gate": 1.0},
    "every row corrected": {"tau": 2.0, "hysteresis": 0.0},
    "cosine 0.9, by codes": {"selector": "codes", "tau": 0.9},
    "gate 0.005": {"gate": 0.005},
    "gate 0.1": {"gate": 0.1},
    "no hysteresis": {"hysteresis": 0.0},
    "four windows of blocks": {"windows": 4},
    "half of the budget": {"budget_tokens": 1 * K},
    "pages chosen, nothing moves": {},  # queries stand still
}
_ABLATED = ((8, 32 * K), (1, 32 * K))  # cells
_DEPTHS, _STEPS = (2, 4), 24  # layers of the two graphs
_REHEARSED_DEPTHS, _REHEARSED_STEPS, _REHEARSED_SETTINGS = (1, 2), 1, 3


def run(session: Session) -> None:
    failures, stopwatch = Failures(session), Stopwatch(session.device)
    for batch_size, context in REHEARSED_STEP_CELLS if session.is_rehearsal else STEP_CELLS:
        if not session.has_time(10, f"batch {batch_size}, context {context}"):
            break
        with failures.kept(f"batch {batch_size}, context {context}"), torch.no_grad():
            _measure_plain(session, stopwatch, batch_size, context)
            _measure_engine(session, failures, batch_size, context)
    failures.raise_first()


def _measure_plain(session: Session, stopwatch: Stopwatch, batch_size: int, context: int) -> None:
    """Window-only and full attention."""
    work = LayerWork(session.shape, batch_size, session.device)
    logits = stopwatch.slope(work.compute_logits).median
    window = min(context, session.config.budget_tokens)
    attentions = {
        "window": lambda: attend_blocks(session, batch_size, window, window_attention),
        "full": lambda: _attend_to_all(session, batch_size, context),
    }
    for mode, new in attentions.items():
        layer = stopwatch.slope(plain_layer(work, new())).median
        _record(session, session.shape.layers * layer + logits, mode=mode, batch=batch_size, context=context)


def _attend_to_all(session: Session, batch_size: int, context: int) -> Callable[[], torch.Tensor]:
    if session.is_rehearsal:
        return attend_blocks(session, batch_size, context, window_attention)
    g = session.shape.geometry(1)
    q = torch.randn((batch_size, g.num_qo_heads, g.head_dim), device=session.device).to(g.dtype)
    kv = torch.zeros((2, batch_size, g.num_kv_heads, g.head_dim), dtype=g.dtype, device=session.device)
    written = torch.empty_like(kv)
    attend, _ = full_attention(g, context, q)

    def attend_and_write() -> torch.Tensor:
        written.copy_(kv)
        return attend()

    return attend_and_write


def _measure_engine(session: Session, failures: Failures, batch_size: int, context: int) -> None:
    """The engine with its default settings, then with others."""
    depths, steps = (_REHEARSED_DEPTHS, _REHEARSED_STEPS) if session.is_rehearsal else (_DEPTHS, _STEPS)
    stack = EngineStack(session, batch_size, context, depths[1], steps + WARM_UP_STEPS, window_attention)
    is_ablated = session.is_rehearsal or (batch_size, context) in _ABLATED
    settings = [(DEFAULT, {}), *(SETTINGS.items() if is_ablated else ())]
    try:
        for name, change in settings[: 1 + _REHEARSED_SETTINGS] if session.is_rehearsal else settings:
            what = f"{name}, batch {batch_size}, context {context}"
            if not session.has_time(3, what):
                break
            with failures.kept(what):
                drift = STILL if name != DEFAULT and not change else MOVING
                config = changed(session.config, change)
                plan, layer, tail, counted = time_layer(stack, depths, steps, drift, config)
                found = traffic_of(stack, counted, steps, session.shape.layers / depths[1])
                cell = {"mode": "freekv", "settings": name, "batch": batch_size, "context": context}
                cell["moves"] = drift
                _record(session, plan + session.shape.layers * layer + tail, **cell, **found)
                if name == DEFAULT:
                    session.record("stack_plan", round(plan * 1e6, 2), "us", batch=batch_size, context=context)
                audit(session, stack, what)
    finally:
        stack.memory.unpin()


def changed(config: FreeKVConfig, change: dict[str, object]) -> FreeKVConfig:
    """Settings with one changed; a budget only where it is less."""
    if "budget_tokens" in change and change["budget_tokens"] > config.budget_tokens:
        change = {"budget_tokens": config.budget_tokens // 2}
    return replace(config, **change)


def _record(session: Session, seconds: float, **cell: int | float | str) -> None:
    session.record("stack_step", round(seconds * 1e3, 4), "ms", **cell)
