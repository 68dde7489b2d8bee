"""Phase language: a trained language model says with FreeKV what it says with plain SGLang, and over its budget nearly.

The model is SmolLM2-135M-Instruct, as `python -m tools.pretrained` writes it; the texts are this repository's own. The
engine with FreeKV is audited and has blocks for few windows, so that pages are recalled.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.gpu.serve_check import Engine, given_logprobs, run_engines
from benchmarks.gpu.session import Session
from benchmarks.records import ROOT
from sglang_freekv.testing.tiny_model import TinyModel
from tools.pretrained.smollm2 import FOLDER

WITHIN, NARROW = range(2)  # the calls
# So many that the blocks, which hold two windows of the longest text, do not hold all of them.
_TEXTS = (
    *("README.md", "DESIGN.md", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("docs/flags.md", "docs/reliability.md", "docs/rivals.md", "docs/troubleshooting.md"),
)
_NARROW_TOKENS = 512
_MOST_GAP = 0.5  # nats of a token's log-probability, on average, over a budget that is far too small
_LEAST_EQUAL = 0.3  # after the first token that rounding flips, texts differ; wrong attention flips nearly every one


def run(session: Session) -> None:
    model, calls = _model(session), make_calls(session)
    engines = make_engines(session, model)
    run_engines(session, engines, calls)
    plain, freekv = engines
    session.check("both engines answered", all(e.result for e in engines), str([e.name for e in engines]))
    for call, what in ((WITHIN, "within the budget"), (NARROW, f"budget {_narrow(session)}")):
        # Plain SGLang knows no budget: its texts are the same for both.
        equal, gap = agreement(plain.replies(WITHIN), freekv.replies(call))
        session.record("equal_tokens", round(equal, 4), "share", what=f"language model, {what}")
        session.record("logprob_gap", round(gap, 4), "nats, mean", what=f"language model, {what}")
        if call == WITHIN:
            name = "a language model within its budget says what plain SGLang says"
            session.check(name, equal >= _LEAST_EQUAL, f"{equal:.2f} of the tokens are equal")
        else:
            name = "over its budget a language model says nearly what plain SGLang says"
            session.check(name, gap <= _MOST_GAP, f"{gap:.3f} nats of a log-probability")
    rows, recalled = (freekv.counted(name, NARROW) for name in ("rows", "recalled_bytes"))
    session.record("flagged_rows", round(freekv.counted("flagged_rows", NARROW) / max(1, rows), 4), "share")
    session.check("over its budget it recalls pages", rows > 0 and recalled > 0, f"{rows} rows, {recalled} bytes")
    session.check("no page of it was absent", freekv.state["absent_pages"] == 0)


def _model(session: Session) -> Path:
    """A rehearsal has a tiny one.

    Raises
    ------
    FileNotFoundError
        If the model was not brought along.
    """
    if session.is_rehearsal:
        folder = session.out / "models" / "language"
        if not (folder / "config.json").exists():
            TinyModel(head_dim=64).write(folder)
        return folder
    if not (FOLDER / "config.json").exists():
        raise FileNotFoundError(f"no language model in {FOLDER}: make it with python -m tools.pretrained, and bring it")
    return FOLDER


def _narrow(session: Session) -> int:
    return 192 if session.is_rehearsal else _NARROW_TOKENS


def make_calls(session: Session) -> list[dict]:
    """Texts within the budget, and the same over one that is far too small for them."""
    length, steps = (600, 6) if session.is_rehearsal else (10_000, 64)
    texts = [(ROOT / name).read_text()[:length] for name in _TEXTS]
    sampling = {"temperature": 0, "max_new_tokens": steps, "ignore_eos": True}
    narrow = sampling | {"custom_params": {"freekv_budget": _narrow(session)}}
    return [{"prompt": texts, "sampling_params": s, "return_logprob": True} for s in (sampling, narrow)]


def make_engines(session: Session, model: Path) -> list[Engine]:
    """Plain SGLang and FreeKV; side by side, as nothing is timed."""
    common = {"model_path": str(model), "dtype": "bfloat16", "max_running_requests": 8, "random_seed": 0}
    common |= {"max_total_tokens": 8192 if session.is_rehearsal else 65536, "log_level": "info"}
    if session.device == "cuda":
        common |= {"mem_fraction_static": 0.4, "attention_backend": "flashinfer"}
        common |= {"cuda_graph_bs_decode": [1, 2, 4, 8], "disable_prefill_cuda_graph": True}
    wide, blocks = (1024, 0.0045) if session.is_rehearsal else (4096, 0.2)
    own = {"kv_retrieval": "freekv", "freekv_budget": wide, "freekv_sink": 64, "freekv_recent": 64}
    own |= {"freekv_audit": True, "freekv_device_blocks_memory": blocks}
    return [Engine("language plain", common), Engine("language freekv", common | own)]


def agreement(expected: list[dict], found: list[dict]) -> tuple[float, float]:
    """Share of tokens up to the first that differs, and the mean gap of their log-probabilities."""
    equal, total, gaps = 0, 0, []
    for a, b in zip(expected, found, strict=True):
        is_same = torch.tensor(a["output_ids"]) == torch.tensor(b["output_ids"])
        agreed = int(is_same.long().cumprod(0).sum())
        equal, total = equal + agreed, total + len(is_same)
        gaps.append((given_logprobs(a) - given_logprobs(b)).abs()[:agreed])
    together = torch.cat(gaps)
    return equal / total, float(together.mean()) if len(together) else float("inf")
