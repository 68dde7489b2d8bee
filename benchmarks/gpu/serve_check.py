"""Phase serve: real engines with a small model; FreeKV must say what plain SGLang says, within the rounding of bf16.

Every engine answers the same calls: ragged lengths in one batch, prompts of several chunks, a prefix that is cached,
one request alone. Their log-probabilities are compared as long as both have generated the same tokens: after the first
other token, each continues another text.

Two runs in bf16 differ where other kernels take part, and how much depends on the text. So a second plain engine, with
other chunks and no prefix cache, says what rounding does to these texts. FreeKV may differ from plain by twice that
(root mean square over all tokens compared), or by `_ROUNDING` where that is more. The control is a budget far below the
length of the prompts: it must differ by more than is allowed, and more than twice as much as the same prompts within
the budget, else the comparison tells nothing.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.gpu.session import Session
from benchmarks.records import ROOT
from sglang_freekv.tiny_model import TinyModel

_ROUNDING = 0.03  # log-probability: a logit of the model is up to 16, whose bf16 steps are 0.06
_NARROW = 256  # tokens of budget for requests that must select
_WIDE = 8192


@dataclass
class Engine:
    """One engine: its keywords, and what it answered."""

    name: str
    keywords: dict
    result: dict | None = None

    @property
    def state(self) -> dict:
        """Counters and sizes of FreeKV after the last call."""
        return self.result["states"][-1]

    def replies(self, call: int) -> list[dict]:
        return self.result["replies"][call]

    def counted(self, name: str, call: int) -> int:
        """What a counter advanced by in a call."""
        before, after = self.result["states"][call : call + 2]
        return after[name] - before[name]


def run(session: Session) -> None:
    model = session.out / "models" / "tiny"
    if not (model / "config.json").exists():
        TinyModel(head_dim=64 if session.is_rehearsal else 128).write(model)
    calls = make_calls(session)
    engines = {engine.name: engine for engine in make_engines(session, model)}
    run_engines(session, list(engines.values()), calls)
    session.check("every engine answered", all(e.result for e in engines.values()), str(list(engines)))
    for engine in engines.values():
        session.record("engine_start", engine.result["start_seconds"], "s", engine=engine.name)

    plain, freekv, again = engines["plain"], engines["freekv"], engines["plain again"]
    rounding = rms_difference(plain, again, *WITHIN)
    session.record("logprob_difference", rounding, "root mean square", what="plain, twice")
    for name in [name for name in engines if not name.startswith("plain")]:
        compare(session, plain, engines[name], max(2 * rounding, _ROUNDING))
    narrow = difference(plain.replies(LONG), freekv.replies(NARROW))[0]
    within = rms_difference(plain, freekv, LONG)
    detail = (
        f"root mean square {narrow:.3f}, within the budget {within:.3f}, allowed {max(2 * rounding, _ROUNDING):.3f}"
    )
    is_seen = narrow > max(2 * within, 2 * rounding, _ROUNDING)
    session.check("the comparison sees a budget that is too small", is_seen, detail)
    cached = freekv.replies(PREFIX)[0]["meta_info"]["cached_tokens"]
    session.check("a prefix is found in the cache", cached > 0, f"{cached} tokens")
    check_counters(session, engines)


BATCH, SINGLE, PREFIX, LONG, NARROW = range(5)  # the calls
WITHIN = (BATCH, SINGLE, PREFIX, LONG)  # the budget


def make_calls(session: Session) -> list[dict]:
    """Ragged prompts together; the last of them alone; with another end; long ones within a budget, and over one."""
    rng = random.Random("serve")
    lengths = [1, 33, 300, 700] if session.is_rehearsal else [1, 31, 32, 33, 257, 1000, 1700, 3000]
    steps = 8 if session.is_rehearsal else 64
    prompts = [rng.choices(range(32, 127), k=n) for n in lengths]
    prefix = prompts[-1][: -lengths[-1] // 4] + rng.choices(range(32, 127), k=40)
    long = [rng.choices(range(32, 127), k=lengths[-1]) for _ in range(3 if session.is_rehearsal else 8)]

    def call(prompts: list[list[int]], **custom: int) -> dict:
        sampling = {"temperature": 0, "max_new_tokens": steps, "ignore_eos": True}
        if custom:
            sampling["custom_params"] = custom
        return {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}

    return [call(prompts), call(prompts[-1:]), call([prefix]), call(long), call(long, freekv_budget=_NARROW)]


def make_engines(session: Session, model: Path) -> list[Engine]:
    """Plain SGLang, twice, and FreeKV: with graphs, without, audited, and with dense layers."""
    common = {
        "model_path": str(model),
        "dtype": "bfloat16",
        "max_running_requests": 16,
        "max_total_tokens": 65536,
        "chunked_prefill_size": 512,
        "log_level": "info",
        "random_seed": 0,
    }
    if session.device == "cuda":
        # Engines run at the same time. FlashAttention 3, the default on Hopper, may not be installed.
        common |= {
            "mem_fraction_static": 0.5,
            "attention_backend": "flashinfer",
            "cuda_graph_bs_decode": [1, 2, 4, 8, 16],
        }
    freekv = {
        **common,
        "kv_retrieval": "freekv",
        "freekv_budget": _WIDE,
        "freekv_sink": 64,
        "freekv_recent": 64,
        "freekv_device_blocks_memory": 1.0,
    }
    no_graphs = {"disable_decode_cuda_graph": True}
    engines = [
        Engine("plain", common),
        Engine("plain again", {**common, "chunked_prefill_size": 4096, "disable_radix_cache": True}),
        Engine("freekv", freekv),
        Engine("freekv without graphs", {**freekv, **no_graphs}),
        Engine("freekv audited", {**freekv, "freekv_audit": True, "disable_overlap_schedule": True}),
        Engine("freekv dense layers", {**freekv, "freekv_dense_layers": "0,1"}),
    ]
    return engines[:3] if session.is_rehearsal else engines


def run_engines(session: Session, engines: list[Engine], calls: list[dict]) -> None:
    """Run all engines side by side: nothing is timed here, and each takes little of the GPU."""
    folder = session.out / "serve"
    folder.mkdir(exist_ok=True)
    processes = {}
    for engine in engines:
        stem = engine.name.replace(" ", "-")
        path = folder / f"{stem}.json"
        # Plain SGLang knows no budget of a request.
        known = [c for c in calls if "kv_retrieval" in engine.keywords or "custom_params" not in c["sampling_params"]]
        path.write_text(json.dumps({"engine": engine.keywords, "calls": known}))
        log = (session.out / "logs" / f"serve-{stem}.log").open("w")
        command = [sys.executable, str(Path(__file__).with_name("engine_job.py")), str(path)]
        processes[engine.name] = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    for engine in engines:
        process, stem = processes[engine.name], engine.name.replace(" ", "-")
        try:
            status = process.wait(max(session.left, 1))
        except psutil.TimeoutExpired:
            for child in [*process.children(recursive=True), process]:
                child.kill()
            status = "killed, the time is over"
        replies = folder / f"{stem}.replies.json"
        if replies.exists():
            engine.result = json.loads(replies.read_text())
        else:
            log = session.out / "logs" / f"serve-{stem}.log"
            session.say(f"{engine.name} ended with {status}:\n" + "\n".join(log.read_text().splitlines()[-30:]))


def difference(expected: list[dict], found: list[dict]) -> tuple[float, float, float]:
    """Root mean square and largest difference of log-probabilities while tokens agree, and the share of equal texts.

    The first token that differs counts too: its log-probability is that of the best token in both.
    """
    squares, largest, equal = [], 0.0, 0
    for a, b in zip(expected, found, strict=True):
        pairs = zip(a["meta_info"]["output_token_logprobs"], b["meta_info"]["output_token_logprobs"], strict=True)
        equal += a["output_ids"] == b["output_ids"]
        for (left, token, *_), (right, other, *_) in pairs:
            squares.append((left - right) ** 2)
            largest = max(largest, abs(left - right))
            if token != other:
                break
    return math.sqrt(sum(squares) / len(squares)), largest, equal / len(expected)


def rms_difference(expected: Engine, found: Engine, *calls: int) -> float:
    """Root mean square over several calls."""
    replies = [[reply for call in calls for reply in engine.replies(call)] for engine in (expected, found)]
    return difference(*replies)[0]


def compare(session: Session, plain: Engine, freekv: Engine, allowed: float) -> None:
    for call, what in zip(WITHIN, ("ragged batch", "alone", "cached prefix", "long"), strict=True):
        rms, largest, share = difference(plain.replies(call), freekv.replies(call))
        name = f"{freekv.name}, {what}"
        session.record("equal_texts", share, "ratio", what=name)
        session.record("logprob_difference", rms, "root mean square", what=name, largest=round(largest, 4))
    rms = rms_difference(plain, freekv, *WITHIN)
    detail = f"root mean square {rms:.4f}, allowed {allowed:.4f}"
    session.check(f"{freekv.name} says what plain SGLang says", rms <= allowed, detail)


def check_counters(session: Session, engines: dict[str, Engine]) -> None:
    """Requests over their budget recall, nobody attends to a page that is not there, and the audit found nothing."""
    for name, engine in engines.items():
        if name.startswith("plain"):
            continue
        session.record("freekv_state", 1, "recorded", engine=name, shown=False, **engine.state)
        session.check(f"{name}: no page was absent", engine.state["absent_pages"] == 0)
        rows, flagged = engine.counted("rows", NARROW), engine.counted("flagged_rows", NARROW)
        session.check(f"{name}: narrow requests were over their budget", rows > 0, f"{flagged} of {rows} rows flagged")
        hits, recalled = engine.counted("hits", NARROW), engine.counted("recalled_bytes", NARROW)
        session.check(f"{name}: they selected pages", hits + recalled > 0, f"{hits} hits, {recalled} bytes recalled")
    without = engines.get("freekv without graphs")
    if without is not None:
        _, _, share = difference(engines["freekv"].replies(BATCH), without.replies(BATCH))
        session.record("equal_texts", share, "ratio", what="with and without graphs")
    if "freekv audited" in engines:
        log = (session.out / "logs" / "serve-freekv-audited.log").read_text()
        session.check("the audit found nothing", "AuditError" not in log)
