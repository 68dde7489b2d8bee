"""Phase throughput: long requests through whole engines of an 8B shape, plain SGLang and FreeKV one after the other.

Weights are random, and so are prompts: what is corrected and recalled stands beside each number. Prompts are computed
in one call and decoded in the next, which finds them in the prefix cache, so that each has a time of its own.
"""

from __future__ import annotations

import random

from benchmarks.gpu.serve_check import Engine, run_engines
from benchmarks.gpu.session import Failures, Session

WARM_UP, PREFILL, DECODE = range(3)  # the calls


def run(session: Session) -> None:
    batch, context, steps = (2, 320, 4) if session.is_rehearsal else (8, 16384, 128)
    calls, failures = make_calls(batch, context, steps), Failures(session)
    for engine in make_engines(session, batch, context + steps):
        # An engine starts in half a minute; what runs beside another is not timed.
        if not session.has_time(40, engine.name):
            break
        with failures.kept(engine.name):
            run_engines(session, [engine], calls)
            session.check(f"{engine.name} answered", engine.result is not None)
            _record(session, engine, batch, context, steps)
    failures.raise_first()


def _record(session: Session, engine: Engine, batch: int, context: int, steps: int) -> None:
    seconds, cell = engine.result["seconds"], {"mode": engine.name, "batch": batch, "context": context}
    cached = [reply["meta_info"]["cached_tokens"] for reply in engine.replies(DECODE)]
    name = f"{engine.name} finds its prompts in the cache"
    session.check(name, min(cached) > context * 0.8, f"{min(cached)} of {context} tokens")
    found = {}
    if engine.name == "freekv":
        rows, flagged = engine.counted("rows", DECODE), engine.counted("flagged_rows", DECODE)
        recalled = engine.counted("recalled_bytes", DECODE) / batch / steps
        found = {"flagged": round(flagged / max(1, rows), 4), "recalled_mb": round(recalled / 1e6, 2)}
        session.check("throughput: pages are selected", rows > 0)
        session.check("throughput: no page was absent", engine.state["absent_pages"] == 0)
    session.record("served_prefill", round(batch * context / seconds[PREFILL], 1), "tokens/s", **cell)
    session.record("served_throughput", round(batch * steps / seconds[DECODE], 1), "tokens/s", **cell, **found)
    session.record("engine_start", engine.result["start_seconds"], "s", engine=f"8B shape, {engine.name}")


def make_calls(batch: int, context: int, steps: int) -> list[dict]:
    """A short prompt; long ones, for one token; the same for many."""
    rng = random.Random("throughput")
    long = [rng.choices(range(32, 127), k=context) for _ in range(batch)]
    sizes = ((long[0][:64], steps), (long, 1), (long, steps))
    return [
        {
            "input_ids": prompts if prompts is long else [prompts],
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        }
        for prompts, tokens in sizes
    ]


def make_engines(session: Session, batch: int, longest: int) -> list[Engine]:
    model = session.shape.write(session.out / "models" / session.shape_name)
    tokens = batch * (longest + 64) + 4096
    common = {"model_path": str(model), "load_format": "dummy", "dtype": "bfloat16", "random_seed": 0}
    common |= {"max_running_requests": batch, "log_level": "info", "max_total_tokens": tokens}
    if session.device == "cuda":
        common |= {"mem_fraction_static": 0.8, "attention_backend": "flashinfer"}
        common |= {"cuda_graph_bs_decode": [1, batch], "disable_prefill_cuda_graph": True}
    own: dict = {"kv_retrieval": "freekv"}
    if session.is_rehearsal:
        own |= {"freekv_budget": 192, "freekv_sink": 32, "freekv_recent": 32, "freekv_device_blocks_memory": 0.05}
    return [Engine("plain", common), Engine("freekv", common | own)]
