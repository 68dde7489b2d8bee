"""Compare this step's queries with the previous step's."""

from __future__ import annotations

import torch


def compare_queries(q: torch.Tensor, last_q: torch.Tensor) -> torch.Tensor:
    """Measure how far the queries of each KV head have moved.

    similarity[b, h] = mean over g of cos(q[b, h, g], last_q[b, h, g])

    Parameters
    ----------
    q, last_q : model dtype, ``[batch_size, num_kv_heads, group_size, head_dim]``, device
        Post-RoPE queries of this step and of the previous one.

    Returns
    -------
    float32, ``[batch_size, num_kv_heads]``, in [-1, 1]

    Notes
    -----
    Source: FreeKV (arXiv 2505.13109), fine-grained correction; a row is corrected where this is below tau.
    """
    return torch.cosine_similarity(q.float(), last_q.float(), dim=-1).mean(-1)
