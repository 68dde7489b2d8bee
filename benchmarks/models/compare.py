"""Small checkpoints with random weights, answered by plain SGLang and by FreeKV, one engine after the other."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from benchmarks.gpu.serve_check import difference
from benchmarks.records import ROOT
from sglang_freekv.memory.geometry import GPU_HEAD_DIMS, Geometry, stored_head_dim
from sglang_freekv.testing.tiny_model import TinyModel
from sglang_freekv.testing.tiny_sliding_model import TinySlidingModel

MODELS = {
    "llama-mha": TinyModel("llama", heads=4, kv_heads=4, head_dim=64),
    "llama-96": TinyModel("llama", hidden=384, heads=6, kv_heads=2, head_dim=96),
    "llama-256": TinyModel("llama", heads=4, kv_heads=2, head_dim=256),
    "llama-group-3": TinyModel("llama", hidden=384, heads=6, kv_heads=2, head_dim=128),
    "llama-group-8": TinyModel("llama", heads=8, kv_heads=1, head_dim=128),
    "llama-group-16": TinyModel("llama", heads=16, kv_heads=1, head_dim=128),
    "mistral": TinyModel("mistral", heads=8, kv_heads=2, head_dim=128),
    "qwen2": TinyModel("qwen2", hidden=448, heads=7, kv_heads=1, head_dim=64),  # on a CPU SGLang takes hidden / heads
    "qwen3": TinyModel("qwen3", heads=8, kv_heads=2, head_dim=128),
    "qwen3-moe": TinyModel("qwen3_moe", heads=8, kv_heads=1, head_dim=128),
    # Plain SGLang on a CPU has no soft caps, and serves neither GPT-OSS nor Exaone 4 with windows.
    "gemma3": TinySlidingModel("gemma3_text"),
    "cohere2": TinySlidingModel("cohere2"),
}
_LAYERS = 3  # where windows slide the last one sees everything
_COVERED, _OVER = (45, 100, 160), (700, 1000, 1300)  # tokens of the prompts
_MAX_BUDGET, _BUDGET, _NEW = 192, 128, 24  # tokens
_ENGINE_SECONDS = 400


class EngineFailed(RuntimeError):
    """An engine ended without an answer; the message has the last lines of its log."""


@dataclass(frozen=True)
class Outcome:
    """What a model did."""

    equal_tokens: float  # share of the covered requests' tokens that are plain SGLang's
    logprob_difference: float  # nats, the largest while the tokens agree
    has_finished: bool
    recalled_blocks: int
    absent_pages: int

    @property
    def passes_audit(self) -> bool:
        return self.has_finished and self.recalled_blocks > 0 and self.absent_pages == 0


def make_model(name: str, dtype: str) -> TinyModel | TinySlidingModel:
    return replace(MODELS[name], layers=_LAYERS, dtype=dtype)


def run_model(
    model: TinyModel | TinySlidingModel,
    device: str,
    folder: Path,
    seconds: float = _ENGINE_SECONDS,
    num_at_once: int = 1,
) -> Outcome:
    """Write the checkpoint, run both engines, compare them.

    Parameters
    ----------
    folder : Path
        Empty; keeps checkpoint, jobs, replies and logs.
    seconds : float
        Limit of each engine.
    num_at_once : int
        Engines that run at the same time, 1 or 2.

    Raises
    ------
    EngineFailed
        If one of them does not answer.
    """
    model.write(folder / "model")
    rng = random.Random("models")
    covered, over = ([rng.choices(range(32, 127), k=n) for n in lengths] for lengths in (_COVERED, _OVER))
    common = _common_keywords(model, device) | {"model_path": str(folder / "model")}
    jobs = {
        "plain": (_plain_keywords(model, device), [_call(covered)]),
        "freekv": (_freekv_keywords(model, device), [_call(covered, freekv_budget=_MAX_BUDGET), _call(over)]),
    }

    def result_of(name: str) -> dict:
        keywords, calls = jobs[name]
        return run_engine(name, common | keywords, calls, folder, seconds)

    with ThreadPoolExecutor(num_at_once) as pool:
        plain, freekv = pool.map(result_of, jobs)
    (expected,), (found, narrow) = plain["replies"], freekv["replies"]
    before, after = freekv["states"][1:]
    return Outcome(
        equal_tokens=_equal_tokens(expected, found),
        logprob_difference=difference(expected, found)[1],
        has_finished=all(len(reply["output_ids"]) == _NEW for reply in narrow),
        recalled_blocks=(after["recalled_bytes"] - before["recalled_bytes"]) // _geometry(model, device).block_bytes,
        absent_pages=after["absent_pages"],
    )


def _equal_tokens(expected: list[dict], found: list[dict]) -> float:
    tokens = [torch.tensor([reply["output_ids"] for reply in replies]) for replies in (expected, found)]
    return (tokens[0] == tokens[1]).float().mean().item()


def _call(prompts: list[list[int]], **custom: int) -> dict:
    sampling = {"temperature": 0, "max_new_tokens": _NEW, "ignore_eos": True}
    if custom:
        sampling["custom_params"] = custom
    return {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}


def _common_keywords(model: TinyModel | TinySlidingModel, device: str) -> dict:
    keywords = {
        "device": device,
        "dtype": model.dtype,
        "max_running_requests": len(_OVER),
        "max_total_tokens": 4096,
        "chunked_prefill_size": 64,
        "log_level": "info",
        "random_seed": 0,
    }
    if device == "cuda":
        # Other engines may run at the same time. FlashAttention 3, the default on Hopper, may not be installed.
        keywords |= {
            "attention_backend": "flashinfer",
            "mem_fraction_static": 0.5,
            "cuda_graph_bs_decode": list(range(1, len(_OVER) + 1)),
            "disable_prefill_cuda_graph": True,
        }
    return keywords


def _plain_keywords(model: TinyModel | TinySlidingModel, device: str) -> dict:
    """Where FlashInfer has no kernel for the heads, SGLang's other attention is the measure."""
    is_missing = device == "cuda" and model.head_dim not in GPU_HEAD_DIMS
    return {"attention_backend": "triton"} if is_missing else {}


def _freekv_keywords(model: TinyModel | TinySlidingModel, device: str) -> dict:
    geometry = _geometry(model, device)
    # Both windows of every request; the longer prompts have more pages than that.
    blocks_bytes = len(_OVER) * 2 * _MAX_BUDGET // geometry.page_size * geometry.page_bytes
    return {
        "kv_retrieval": "freekv",
        "freekv_audit": True,
        "freekv_budget": _BUDGET,
        "freekv_max_budget": _MAX_BUDGET,
        "freekv_sink": 32,
        "freekv_recent": 32,
        "freekv_arena": 512,  # longer prefixes are laid out in pieces
        "freekv_device_blocks_memory": blocks_bytes / 2**30,
    }


def _geometry(model: TinyModel | TinySlidingModel, device: str) -> Geometry:
    return Geometry(
        num_layers=model.layers,
        num_qo_heads=model.heads,
        num_kv_heads=model.kv_heads,
        head_dim=stored_head_dim(model.head_dim, device),
        dtype=getattr(torch, model.dtype),
    )


def run_engine(name: str, keywords: dict, calls: list[dict], folder: Path, seconds: float) -> dict:
    """Run `sgl.Engine` in processes of its own, return what benchmarks/gpu/engine_job.py writes."""
    path, log = folder / f"{name}.json", folder / f"{name}.log"
    path.write_text(json.dumps({"engine": keywords, "calls": calls}))
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "engine_job.py"), str(path)]
    with log.open("w") as file:
        process = psutil.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        for child in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    replies = path.with_suffix(".replies.json")
    if not replies.exists():
        raise EngineFailed(f"{name} gave no answer:\n" + "\n".join(log.read_text().splitlines()[-30:]))
    return json.loads(replies.read_text())
