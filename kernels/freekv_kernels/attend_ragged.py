"""Prefill attention over contiguous keys and values, and the merge of its parts."""

from __future__ import annotations

import torch

from freekv_kernels.logits import cap_logits

# Of logits that are computed at a time, where torch has no attention that would keep them in its tiles.
_LOGITS = 1 << 23


def attend_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    sliding_window: int | None = None,
    logit_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one request's queries to one contiguous run of keys, and return the softmax state.

    Parameters
    ----------
    q : model dtype, ``[num_queries, num_qo_heads, head_dim]``, device
    k, v : model dtype, ``[num_keys, num_kv_heads, head_dim]``, device (NHD)
    scale : float
    causal : bool
        The last query sees all keys, each one before a key less (the chunk itself, behind tokens of its prefix or
        none); otherwise every query sees all keys (a piece of the prefix).
    sliding_window : int, optional
        Keys that a query sees at most, its latest ones; only where it is causal. By default all.
    logit_cap : float
        Scaled logits become cap * tanh(logit / cap); 0: they stay.

    Returns
    -------
    out : float32, ``[num_queries, num_qo_heads, head_dim]``
    lse : float32, ``[num_queries, num_qo_heads]``
        log sum exp of the scaled logits (natural logarithm), by which parts are merged.
    """
    if logit_cap or (causal and (sliding_window is not None or len(q) != len(k))):
        return _attend_by_blocks(q, k, v, scale, causal, sliding_window, logit_cap)
    return _attend(q, k, v, scale, causal)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    # The only public entry point that also returns the softmax state runs on CUDA alone.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        0.0,
        causal,
        attn_mask=None if mask is None else mask.to(q.dtype),
        scale=scale,
    )
    return out[0].transpose(0, 1).float(), lse[0].transpose(0, 1)


def _attend_by_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    logit_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few queries at a time, each block with the keys that its queries see: a window is read once."""
    num_queries, num_qo_heads = q.shape[:2]
    ahead, num_seen = len(k) - num_queries, len(k) if sliding_window is None else min(len(k), 2 * sliding_window)
    size = max(_LOGITS // (num_qo_heads * num_seen), 64)
    parts = []
    for start in range(0, num_queries, size):
        queries = q[start : start + size]
        position = torch.arange(ahead + start, ahead + start + len(queries))
        first, last = 0, len(k)
        if causal:
            last = int(position[-1]) + 1
            first = 0 if sliding_window is None else max(int(position[0]) + 1 - sliding_window, 0)
        is_hidden = torch.arange(first, last) > (position[:, None] if causal else last)
        if sliding_window is not None:
            is_hidden |= torch.arange(first, last) <= position[:, None] - sliding_window
        mask = torch.zeros(is_hidden.shape, dtype=torch.float32).masked_fill_(is_hidden, float("-inf"))
        own = (queries, k[first:last], v[first:last], scale)
        parts.append(_attend_capped(*own, logit_cap, mask) if logit_cap else _attend(*own, False, mask))
    out, lse = zip(*parts, strict=True)
    return torch.cat(out), torch.cat(lse)


def _attend_capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, logit_cap: float, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float32, with what is added to the logits, ``mask [num_queries, num_keys]``."""
    num_kv_heads = k.shape[1]
    q = q.float().unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # [num_kv_heads, group, num_queries, head_dim]
    k, v = (x.float().transpose(0, 1)[:, None] for x in (k, v))
    logits = cap_logits(scale * q @ k.transpose(2, 3), logit_cap).add_(mask)
    out, lse = logits.softmax(-1) @ v, logits.logsumexp(-1)
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)


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
