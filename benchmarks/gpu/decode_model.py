"""The model of the decode phases: SGLang's own runner in this process, weights without meaning, and queries that drift.

How much is corrected and recalled follows from how far queries move between steps, and random weights move them in no
particular way. So queries are made to move by a chosen amount. All layers but the embedding write next to nothing, so
hidden states are embeddings, which hold a constant channel and a random walk over the token ids: a request that is
given consecutive tokens walks. Each KV head's queries read the constant with one share and the walk with the rest, so
that the expected cosine of two steps' queries is known. Heads differ as in trained models: most are steady and a few
move a lot. Queries leave the fastest quarter of the rotary pairs out, so that position alone moves them little.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.runner import load_runner
from sglang_freekv.memory.geometry import Geometry

WALK_TOKENS = 512
_PERSISTENCE = 0.8  # cosine of two steps of the walk; what moves comes back the later, the larger it is


def load_dummy(model: Path, device: str, **keywords: object):
    """SGLang's runner with weights whose queries walk; `set_drift` comes next."""
    runner = load_runner(str(model), device, load_format="dummy", dtype="bfloat16", **keywords)
    for name, weight in runner.model.named_parameters():
        if "norm" in name:
            weight.data.fill_(1)
    _walk(runner.model.model.embed_tokens.weight.data)
    return runner


def capture(runner, batch_size: int) -> None:
    """Capture the graph of this batch size, with what it holds by value now; nothing on a CPU."""
    if runner.device == "cpu":
        return
    runner.server_args.cuda_graph_config.decode.bs = [batch_size]
    runner.init_decode_cuda_graph()


def _walk(embedding: torch.Tensor) -> None:
    """Fill the first `WALK_TOKENS` embeddings: a constant channel with half the squared norm, and a random walk."""
    hidden = embedding.shape[1]
    steps = torch.randn((WALK_TOKENS, hidden), device=embedding.device) * (1 - _PERSISTENCE**2) ** 0.5
    walk = torch.randn(hidden, device=embedding.device)
    for token in range(WALK_TOKENS):
        walk = _PERSISTENCE * walk + steps[token]
        embedding[token] = walk
    embedding[:, 0] = hidden**0.5


def set_drift(runner, geometry: Geometry, drift: float) -> None:
    """Draw the weights that make q, k and v, for queries whose cosine with the step before is 1 - `drift` on average.

    Over the KV heads, ``1 - cosine`` has the quantiles of an exponential distribution, up to that of the walk itself.
    """
    g, device = geometry, runner.model.model.embed_tokens.weight.device
    generator = torch.Generator(device=device).manual_seed(0)
    quantiles = -torch.log1p(-(torch.arange(g.num_kv_heads) + 0.5) / g.num_kv_heads)
    walking = (drift * quantiles / quantiles.mean() / (1 - _PERSISTENCE)).clamp(0, 1)  # share of the squared norm
    walking = walking.repeat_interleave(g.group_size * g.head_dim).to(device)[:, None]
    is_slow = torch.arange(g.head_dim, device=device) % (g.head_dim // 2) >= g.head_dim // 8
    is_slow = is_slow.repeat(g.num_qo_heads)[:, None]
    for layer in runner.model.model.layers:
        weight = layer.self_attn.qkv_proj.weight.data
        weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        queries = weight[: g.num_qo_heads * g.head_dim]
        queries[:, :1] *= (2 * (1 - walking)).sqrt() * is_slow
        queries[:, 1:] *= (2 * walking).sqrt() * is_slow
