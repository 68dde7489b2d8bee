"""R-KV: what is attended to stays, unless it repeats what is there already; for long generation.

Source: "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models" (arXiv 2505.24133). At each compression, of
every 128 new tokens, a token's score is lambda * importance - (1 - lambda) * redundancy: importance is its mean
attention from the last 8 queries, the largest of the query group; redundancy is the softmax, over all tokens, of its
key's mean cosine with the others, and a token's latest look-alike is not charged for it.

Here pages are scored instead of tokens, by their keys' mean, and one page goes when one is opened; the softmax of
redundancies therefore runs over tens of pages. Importance is a running mean that forgets at the rate of 8 queries, of
each head's share of attention, where the authors' code takes the largest logit of the group first and pools over
neighbours. The first window is chosen from the whole prompt in the same way.
"""

from __future__ import annotations

import torch

from freekv_kernels import Batch
from sglang_freekv.algorithm.baselines.eviction import EvictionSelector
from sglang_freekv.algorithm.baselines.page_attention import last_positions, page_keys
from sglang_freekv.memory.layers import Layer

_LAMBDA = 0.1
_ALIKE = 0.5  # cosine


class RKVSelector(EvictionSelector):
    """By importance and redundancy; `state` is the importance, a share of attention."""

    baseline = "R-KV (arXiv 2505.24133)"
    num_observed = 8

    def first(self, shares: torch.Tensor, batch: Batch) -> torch.Tensor:
        return shares.exp().amax(3).mean(2)

    def next(self, state: torch.Tensor, shares: torch.Tensor, batch: Batch) -> torch.Tensor:
        return state.lerp(shares.exp().amax(3)[:, :, 0], 1 / self.num_observed)

    def worth(self, layer: Layer, batch: Batch, pages: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        keys, positions = page_keys(layer, batch, pages)
        now = last_positions(batch, keys.shape[-2])
        is_full = positions[..., -1] <= now[:, None, None]
        return _LAMBDA * state - (1 - _LAMBDA) * redundancies(keys.mean(-2), is_full)


def redundancies(keys: torch.Tensor, is_valid: torch.Tensor) -> torch.Tensor:
    """How much each key repeats the others, so that the latest of a few look-alikes repeats least.

    Parameters
    ----------
    keys : float32, ``[..., width, head_dim]``
        In the order of the text.
    is_valid : bool, ``[..., width]``
        The others neither have a redundancy nor cause any.

    Returns
    -------
    float32, ``[..., width]``
        Softmax, over the valid keys, of the mean cosine with the others; 0 where not valid.
    """
    keys = torch.nn.functional.normalize(keys, dim=-1)
    cosines = keys @ keys.transpose(-1, -2)
    is_pair = is_valid[..., None] & is_valid[..., None, :]
    cosines = cosines.masked_fill(~is_pair, 0)
    cosines.diagonal(dim1=-2, dim2=-1).zero_()
    number = torch.arange(cosines.shape[-1])
    latest = torch.where(cosines > _ALIKE, number, 0).amax(-1, keepdim=True)  # look-alike of each, 0 also for none
    means = cosines.scatter(-1, latest, 0).sum(-2) / is_valid.sum(-1, keepdim=True)
    return means.masked_fill(~is_valid, float("-inf")).softmax(-1)
