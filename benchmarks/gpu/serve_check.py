"""Phase serve: real engines with a small model; FreeKV must say what plain SGLang says, within the rounding of bf16.

Every engine answers the same calls: ragged lengths in one batch, prompts of several chunks, a prefix that is cached,
one request alone. Two implementations in bf16 differ by rounding, and how much depends on the text, so neither can be
the other's measure. Both are held against the model in float32 (Hugging Face's, given the tokens that the reply has):
the root mean square error of FreeKV's log-probabilities may be twice that of plain SGLang's. Equal rounding gives a
ratio near 1; the control, a budget far below the length of the prompts, must give more than four.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu.session import Session
from benchmarks.records import ROOT
from sglang_freekv.testing.tiny_model import TinyModel

_NARROW = 256  # tokens of budget for requests that must select


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

    plain, freekv = engines["plain"], engines["freekv"]
    error = ErrorInFloat32(model, session.device)
    rounding = error.of(plain, calls, *WITHIN)
    session.record("logprob_error", rounding, "root mean square", what="plain")
    for name in [name for name in engines if name != "plain"]:
        compare(session, plain, engines[name])
        found = error.of(engines[name], calls, *WITHIN)
        session.record("logprob_error", found, "root mean square", what=name)
        detail = f"error {found:.4f}, plain {rounding:.4f}"
        session.check(f"{name} is as exact as plain SGLang", found <= 2 * rounding, detail)
    narrow = error.of(freekv, calls, NARROW)
    detail = f"error {narrow:.4f}, plain {rounding:.4f}"
    session.check("the comparison sees a budget that is too small", narrow > 4 * rounding, detail)
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
    long = [rng.choices(range(32, 127), k=lengths[-1]) for _ in range(6 if session.is_rehearsal else 12)]

    def call(prompts: list[list[int]], **custom: int) -> dict:
        sampling = {"temperature": 0, "max_new_tokens": steps, "ignore_eos": True}
        if custom:
            sampling["custom_params"] = custom
        return {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}

    return [call(prompts), call(prompts[-1:]), call([prefix]), call(long), call(long, freekv_budget=_NARROW)]


def make_engines(session: Session, model: Path) -> list[Engine]:
    """Plain SGLang, and FreeKV: with graphs, without, audited, and with dense layers."""
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
            "disable_prefill_cuda_graph": True,
        }
    wide = 1024 if session.is_rehearsal else 8192  # tokens of budget, more than any prompt has
    freekv = {
        **common,
        "kv_retrieval": "freekv",
        "freekv_budget": wide,
        "freekv_sink": 64,
        "freekv_recent": 64,
        "freekv_device_blocks_memory": 1.0,
    }
    no_graphs = {"disable_decode_cuda_graph": True}
    # Blocks for the windows of one or two requests: what the others have left must be recalled.
    audit = {"freekv_audit": True, "freekv_device_blocks_memory": 0.005 if session.is_rehearsal else 0.08}
    if session.is_rehearsal:
        return [Engine("plain", common), Engine("freekv", {**freekv, **audit})]
    return [
        Engine("plain", common),
        Engine("freekv", freekv),
        Engine("freekv without graphs", {**freekv, **no_graphs}),
        Engine("freekv audited", {**freekv, **audit}),
        Engine("freekv dense layers", {**freekv, "freekv_dense_layers": "0,1"}),
    ]


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


class ErrorInFloat32:
    """What log-probabilities of replies are off, against the model in float32."""

    def __init__(self, model: Path, device: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()

    def of(self, engine: Engine, calls: list[dict], *which: int) -> float:
        """Root mean square over all tokens of some calls."""
        squares = [
            (self._logprobs(prompt, reply["output_ids"]) - given_logprobs(reply)).square()
            for call in which
            for prompt, reply in zip(calls[call]["input_ids"], engine.replies(call), strict=True)
        ]
        return float(torch.cat(squares).mean().sqrt())

    @torch.no_grad()
    def _logprobs(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        device = self._model.device
        logits = self._model(torch.tensor([prompt + tokens], device=device)).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens, device=device)[:, None])[:, 0].cpu()


def given_logprobs(reply: dict) -> torch.Tensor:
    return torch.tensor([logprob for logprob, *_ in reply["meta_info"]["output_token_logprobs"]])


def difference(expected: list[dict], found: list[dict]) -> tuple[float, float]:
    """Share of equal texts, and largest difference of log-probabilities while the tokens agree."""
    equal, largest = 0, 0.0
    for a, b in zip(expected, found, strict=True):
        is_same = torch.tensor(a["output_ids"]) == torch.tensor(b["output_ids"])
        agreed = int(is_same.long().cumprod(0).sum())
        equal += agreed == len(is_same)
        gaps = (given_logprobs(a) - given_logprobs(b)).abs()[:agreed]
        largest = max(largest, float(gaps.max()) if agreed else 0.0)
    return equal / len(expected), largest


def compare(session: Session, plain: Engine, freekv: Engine) -> None:
    """For the report: how alike the texts are."""
    for call, what in zip(WITHIN, ("ragged batch", "alone", "cached prefix", "long"), strict=True):
        share, largest = difference(plain.replies(call), freekv.replies(call))
        name = f"{freekv.name}, {what}"
        session.record("equal_texts", share, "ratio", what=name)
        session.record("largest_logprob_difference", largest, "nats", what=name)


def check_counters(session: Session, engines: dict[str, Engine]) -> None:
    """Requests over their budget select and recall, and nobody attends to a page that is not there.

    What the audit finds ends its engine, which then has not answered.
    """
    for name, engine in engines.items():
        if name == "plain":
            continue
        session.record("freekv_state", 1, "recorded", engine=name, shown=False, **engine.state)
        session.check(f"{name}: no page was absent", engine.state["absent_pages"] == 0)
        rows, flagged = engine.counted("rows", NARROW), engine.counted("flagged_rows", NARROW)
        session.check(f"{name}: narrow requests were over their budget", rows > 0, f"{flagged} of {rows} rows flagged")
        hits, recalled = engine.counted("hits", NARROW), engine.counted("recalled_bytes", NARROW)
        session.check(f"{name}: they selected pages", hits + recalled > 0, f"{hits} hits, {recalled} bytes recalled")
        if "freekv_audit" in engine.keywords:
            session.check(f"{name}: they recalled pages", recalled > 0, f"{recalled} bytes")
    without = engines.get("freekv without graphs")
    if without is not None:
        share, _ = difference(engines["freekv"].replies(BATCH), without.replies(BATCH))
        session.record("equal_texts", share, "ratio", what="with and without graphs")
