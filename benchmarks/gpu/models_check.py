"""Phase models: other models than the one of `serve`, as `python -m benchmarks.models` runs them."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.session import Failures, Session
from benchmarks.models.compare import Outcome, make_model, run_model

_NAMES = ("qwen3", "qwen3-moe", "llama-group-16", "llama-96")  # heads of 128 elements, stored: what `compile` compiled
_LEAST_EQUAL = 0.3  # after the first token that rounding flips, texts differ; wrong attention flips nearly every one


def run(session: Session) -> None:
    names = ("qwen3-moe",) if session.is_rehearsal else _NAMES
    dtype = "float32" if session.is_rehearsal else "bfloat16"

    def outcome_of(name: str) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            return run_model(make_model(name, dtype), session.device, Path(folder), session.left, num_at_once=2)

    failures = Failures(session)
    with ThreadPoolExecutor(len(names)) as pool:  # nothing is timed here, and each takes little of the GPU
        outcomes = {name: pool.submit(outcome_of, name) for name in names}
    for name, outcome in outcomes.items():
        with failures.kept(name):
            check(session, name, outcome.result())
    failures.raise_first()


def check(session: Session, name: str, outcome: Outcome) -> None:
    session.record("equal_tokens", outcome.equal_tokens, "ratio", model=name)
    session.record("largest_logprob_difference", outcome.logprob_difference, "nats", what=name)
    detail = f"{outcome.equal_tokens:.2f} of the tokens are equal"
    session.check(f"{name} says what plain SGLang says", outcome.equal_tokens >= _LEAST_EQUAL, detail)
    detail = f"{outcome.recalled_blocks} blocks recalled, {outcome.absent_pages} pages absent"
    session.check(f"{name} recalls pages, and none is absent", outcome.passes_audit, detail)
