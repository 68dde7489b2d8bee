"""Prefill attention over contiguous keys and values, and the merge of its parts."""

from __future__ import annotations

import torch


def attend_ragged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one request's queries to one contiguous run of keys, and return the softmax state.

    Parameters
    ----------
    q : model dtype, ``[num_queries, num_qo_heads, head_dim]``, device
    k, v : model dtype, ``[num_keys, num_kv_heads, head_dim]``, device (NHD)
    scale : float
    causal : bool
        Query i sees keys 0..i (the chunk itself, num_queries == num_keys); otherwise all keys (the prefix).

    Returns
    -------
    out : float32, ``[num_queries, num_qo_heads, head_dim]``
    lse : float32, ``[num_queries, num_qo_heads]``
        log sum exp of the scaled logits (natural logarithm), by which parts are merged.
    """
    # The only public entry point that also returns the softmax state runs on CUDA alone.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], 0.0, causal, scale=scale
    )
    return out[0].transpose(0, 1).float(), lse[0].transpose(0, 1)


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over two disjoint sets of keys into attention over their union.

    Parameters
    ----------
    out_a, out_b : float32, ``[num_queries, num_qo_heads, head_dim]``
    lse_a, lse_b : float32, ``[num_queries, num_qo_heads]``

    Returns
    -------
    out, lse : as above

    Notes
    -----
    Source: the attention state of FlashInfer (arXiv 2501.01005), section 2.2.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    return out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None], lse
