"""Rules for selecting pages: the engine's, others that it could have, and bounds on what any of them can gain.

The scores, the poolings and the selection are the engine's own ops wherever it has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from freekv_kernels import (
    Batch,
    Half,
    PageStore,
    compare_queries,
    encode_pages,
    score_pages,
    select_pages,
    summarize_pages,
)
from freekv_kernels.fp8 import decode_fp8, encode_bounds
from freekv_kernels.select_pages import pool_group

EXACT, SPECULATION = 2.0, -1.0  # values of tau


@dataclass(frozen=True)
class Rule:
    """What a decode step attends to. The defaults are the engine's, with this step's query."""

    page_size: int = 32  # tokens
    summary: str = "2-bit keys"  # of SUMMARIES
    parts: int = 1  # a page has a summary per part and counts by the best of them
    pooling: str = "softmax"  # of POOLINGS
    tau: float = EXACT
    sink: int = 128  # tokens
    recent: int = 128  # tokens
    dense_layers: tuple[int, ...] = ()


# A summary with its score:
# float32 [num_kv_heads, group_size, steps, head_dim] x [num_kv_heads, tokens, head_dim] x tokens per part
# -> float32 [num_kv_heads, group_size, steps, full parts], in the unit of unscaled logits


def _op(q: torch.Tensor, k: torch.Tensor, part_size: int, *, bits: int = 0, slack: float = 1.0) -> torch.Tensor:
    """The engine's score, by codes or by the bound; `slack` below 1 shrinks the box around its middle."""
    num_parts, head_dim = k.shape[1] // part_size, k.shape[-1]
    summary = k.new_empty(num_parts, len(k), 2, head_dim, dtype=torch.uint8)
    slots = torch.arange(num_parts * part_size)
    summarize_pages(summary, k[:, : len(slots)].transpose(0, 1), slots, part_size)
    bounds = decode_fp8(summary)
    middle = bounds.mean(2, keepdim=True)
    summary = encode_bounds(*(middle + slack * (bounds - middle)).unbind(2))
    codes = None
    if bits:
        codes = torch.empty(num_parts, len(k), part_size, head_dim * bits // 8, dtype=torch.uint8)
        keys = k[:, : len(slots)].unflatten(1, (num_parts, part_size)).transpose(0, 1)
        store = PageStore(keys[:, :, None], summary, keys.new_empty(0, 2, part_size, head_dim), torch.empty(0))
        encode_pages(slots[part_size - 1 :: part_size], store, codes)
    # To the op, the steps are query heads of one request that is over its budget.
    one, budgets = torch.ones(1, dtype=torch.int64), torch.zeros(1, len(k), dtype=torch.int64)
    batch = Batch(0 * one, 0 * one, torch.arange(num_parts)[None], num_parts * one, num_parts * one, budgets, one)
    return score_pages(q.flatten(1, 2)[None], summary, batch, Half.FRONT, codes=codes).view(*q.shape[:3], num_parts)


def _mean_key(q: torch.Tensor, k: torch.Tensor, part_size: int) -> torch.Tensor:
    means = k[:, : k.shape[1] // part_size * part_size].unflatten(1, (-1, part_size)).mean(2)
    return q @ means[:, None].transpose(-1, -2)


def _largest_logit(q: torch.Tensor, k: torch.Tensor, part_size: int) -> torch.Tensor:
    """Reads every key: what min-max bounds from above."""
    logits = q @ k[:, None, : k.shape[1] // part_size * part_size].transpose(-1, -2)
    return logits.unflatten(-1, (-1, part_size)).amax(-1)


def _sum_of_weights(q: torch.Tensor, k: torch.Tensor, part_size: int) -> torch.Tensor:
    """Reads every key: the logarithm of a page's attention weight, up to a constant."""
    scale = q.shape[-1] ** -0.5
    logits = scale * q @ k[:, None, : k.shape[1] // part_size * part_size].transpose(-1, -2)
    return logits.unflatten(-1, (-1, part_size)).logsumexp(-1) / scale


SUMMARIES: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "min-max": _op,
    "half box": partial(_op, slack=0.5),
    "mean key": _mean_key,
    **{f"{bits}-bit keys": partial(_op, bits=bits) for bits in (1, 2, 4)},
    "largest logit": _largest_logit,
    "sum of weights": _sum_of_weights,
}

# A pooling:
# float32 [rows, group_size, pages], bool [rows, pages], 1 / sqrt(head_dim) -> float32 [rows, pages]
POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "softmax": lambda scores, is_candidate, scale: pool_group(scores, is_candidate, "softmax"),
    "mean": lambda scores, is_candidate, scale: pool_group(scores, is_candidate, "mean"),
    "scaled softmax": lambda scores, is_candidate, scale: pool_group(scores, is_candidate, "scaled", scale),
    "max of softmax": lambda scores, is_candidate, scale: pool_group(scores, is_candidate, "max"),
    "max of scaled softmax": lambda scores, is_candidate, scale: pool_group(scores, is_candidate, "max", scale),
    "max": lambda scores, is_candidate, scale: scores.amax(1),
}


def select(rule: Rule, budget: int, q: torch.Tensor, k: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Choose the windows of decode steps.

    Parameters
    ----------
    rule : Rule
    budget : int, tokens, sink and recent included
    q : float32, ``[num_heads, tail tokens, head_dim]``, post-RoPE
    k : float32, ``[num_kv_heads, tokens, head_dim]``, post-RoPE, of the document and the tail
    steps : int64, ``[steps]``, which tokens of the tail; not the first

    Returns
    -------
    bool, ``[num_kv_heads, steps, pages]``

    Raises
    ------
    ValueError
        If sink and recent leave no room in the budget.
    """
    sink, recent, budget_pages = (n // rule.page_size for n in (rule.sink, rule.recent, budget))
    if budget_pages <= sink + recent:
        raise ValueError(f"budget {budget} is used up by sink {rule.sink} and recent {rule.recent}: pass a larger one")
    num_kv_heads, num_tokens, head_dim = k.shape
    num_pages = -(-num_tokens // rule.page_size)
    of_step = (num_tokens - q.shape[1] + steps) // rule.page_size + 1  # pages that exist at a step
    scores = _scores(rule, q, k, steps)
    # Partial pages have no score: they are recent to every step that sees them.
    scores = torch.nn.functional.pad(scores, (0, num_pages - scores.shape[-1]))
    scores = scores.permute(2, 0, 1, 3).flatten(0, 1)  # rows: step * num_kv_heads + head
    page = torch.arange(num_pages)
    is_candidate = ((page >= sink) & (page < of_step[:, None] - recent)).repeat_interleave(num_kv_heads, 0)
    pooled = POOLINGS[rule.pooling](scores, is_candidate, head_dim**-0.5)[:, None]

    # To the op, every step is a request of its own; the mean over a group of one is no pooling.
    rows = torch.arange(len(steps))
    batch = Batch(
        rows,
        rows,
        page.expand(len(steps), -1),
        of_step,
        of_step,
        rows.new_full((len(rows), num_kv_heads), budget_pages),
        rows[:1],
    )
    windows = torch.full((2, len(steps), num_kv_heads, budget_pages), -1, dtype=torch.int32)
    select_pages(pooled, batch, Half.FRONT, sink, recent, "mean", windows)
    listed = windows[0].long()
    chosen = torch.zeros(len(steps), num_kv_heads, num_pages + 1, dtype=torch.bool)
    chosen.scatter_(-1, listed.where(listed >= 0, num_pages), True)
    chosen = chosen[..., :num_pages] | (of_step <= budget_pages)[:, None, None]
    return (chosen & (page < of_step[:, None])[:, None]).transpose(0, 1)


def _scores(rule: Rule, q: torch.Tensor, k: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Scores ``[num_kv_heads, group_size, steps, full pages]``, with the previous query where it is similar."""
    grouped = q.unflatten(0, (len(k), -1))
    now, before = grouped[:, :, steps], grouped[:, :, steps - 1]
    similarity = compare_queries(now.permute(2, 0, 1, 3), before.permute(2, 0, 1, 3))  # [steps, num_kv_heads]
    query = torch.where((similarity < rule.tau).T[:, None, :, None], now, before)
    scores = SUMMARIES[rule.summary](query, k, rule.page_size // rule.parts)
    full_pages = k.shape[1] // rule.page_size
    return scores[..., : full_pages * rule.parts].unflatten(-1, (full_pages, rule.parts)).amax(-1)


_ENGINE = Rule()
_MIN_MAX = replace(_ENGINE, summary="min-max")
RULES: dict[str, Rule] = {
    "engine": _ENGINE,
    **{name: replace(_ENGINE, summary=name) for name in SUMMARIES if name != _ENGINE.summary},
    **{f"min-max, parts {n}": replace(_MIN_MAX, parts=n) for n in (2, 4, 8)},
    "min-max, page 16": replace(_MIN_MAX, page_size=16),
    "min-max, dense layer 0": replace(_MIN_MAX, dense_layers=(0,)),
    **{f"min-max, {name}": replace(_MIN_MAX, pooling=name) for name in POOLINGS if name != _ENGINE.pooling},
    **{f"page {n}": replace(_ENGINE, page_size=n) for n in (16, 64)},
    **{name: replace(_ENGINE, pooling=name) for name in POOLINGS if name != _ENGINE.pooling},
    **{f"sink {n}, recent {n}": replace(_ENGINE, sink=n, recent=n) for n in (32, 64, 192)},
    "dense layer 0": replace(_ENGINE, dense_layers=(0,)),
    **{f"tau {tau}": replace(_ENGINE, tau=tau) for tau in (0.9, 0.8, 0.7, 0.5)},
    "speculation": replace(_ENGINE, tau=SPECULATION),
}
