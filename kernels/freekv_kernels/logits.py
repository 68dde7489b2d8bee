"""What models make of attention's logits besides a softmax: a soft cap, and a sink that takes a share of the weight."""

from __future__ import annotations

import torch


def cap_logits(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(logits / cap), in place; with a cap of 0 they stay as they are."""
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def add_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Attention whose softmax has one more logit, which has no value: exp(sink) is in the denominator alone.

    Parameters
    ----------
    out : floating, ``[..., head_dim]``
        Attention without sinks.
    lse : float32, ``[...]``
        Its log sum exp (natural logarithm).
    sinks : float32, broadcasts to ``[...]``

    Returns
    -------
    as `out`
    """
    return out * torch.sigmoid(lse - sinks).to(out.dtype)[..., None]
