"""Random queries, keys and values in which retrieval has something to choose and queries to compare."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sglang_freekv.memory.geometry import Geometry

SAME, ONE_HEAD, HALF, ALL = range(4)  # how many query heads of a group turn away between two tokens


@dataclass(frozen=True)
class Trace:
    """What the model would compute for one request: `[num_layers, num_tokens, heads, head_dim]` each."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def tokens(self, layer: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of tokens `first` to `last`, the last one excluded, `[n, heads, head_dim]`."""
        return self.q[layer, first:last], self.k[layer, first:last], self.v[layer, first:last]


def make_trace(
    geometry: Geometry, num_tokens: int, seed: int, *, prefix: Trace | None = None, prefix_tokens: int = 0
) -> Trace:
    """Keys that cluster by page, and queries of which a third turn away from their predecessor.

    A query head that stays keeps a cosine of 0.99 to its predecessor, one that turns has 0.1; where just
    one of several heads turns it has 0.75, so that the mean of its group stays above 0.9. Keys and values of
    the first `prefix_tokens` tokens are those of `prefix`.
    """
    g = geometry
    rng = torch.Generator().manual_seed(seed)
    kv_shape = (g.num_layers, num_tokens, g.num_kv_heads, g.head_dim)
    topics = torch.randn(g.num_layers, math.ceil(num_tokens / g.page_size), *kv_shape[2:], generator=rng)
    k = topics.repeat_interleave(g.page_size, dim=1)[:, :num_tokens] + 0.7 * torch.randn(kv_shape, generator=rng)
    v = torch.randn(kv_shape, generator=rng)
    if prefix is not None:
        k[:, :prefix_tokens] = prefix.k[:, :prefix_tokens]
        v[:, :prefix_tokens] = prefix.v[:, :prefix_tokens]

    kinds = torch.tensor([0.65, 0.1, 0.1, 0.15]).multinomial(math.prod(kv_shape[:3]), True, generator=rng)
    kinds = kinds.view(kv_shape[:3])
    cosines = torch.full((*kv_shape[:3], g.group_size), 0.99)
    cosines[..., 0][kinds == ONE_HEAD] = 0.75
    cosines[..., : (g.group_size + 1) // 2][kinds == HALF] = 0.1
    cosines[kinds == ALL] = 0.1
    cosines = cosines.flatten(2)[..., None]  # [num_layers, num_tokens, num_qo_heads, 1]
    directions = torch.randn(g.num_layers, num_tokens, g.num_qo_heads, g.head_dim, generator=rng)
    q = torch.nn.functional.normalize(directions, dim=-1)
    for t in range(1, num_tokens):
        across = q[:, t] - (q[:, t] * q[:, t - 1]).sum(-1, keepdim=True) * q[:, t - 1]
        across = torch.nn.functional.normalize(across, dim=-1)
        q[:, t] = cosines[:, t] * q[:, t - 1] + (1 - cosines[:, t] ** 2).sqrt() * across
    return Trace(*(x.to(g.dtype) for x in (q * math.sqrt(g.head_dim), k, v)))
