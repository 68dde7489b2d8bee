"""What attention must return, computed from the texts alone."""

from __future__ import annotations

import numpy as np

from tools.fuzz.setups import PAGE_SIZE
from tools.fuzz.texts import Text, Values

TOLERANCE = 1e-4  # of results of magnitude 1


def check_prefill(values: Values, text: Text, layer: int, first: int, last: int, out: np.ndarray, scale: float) -> None:
    """A chunk attends to every token up to its own; `out [n, num_kv_heads, group_size, head_dim]`."""
    kv = values.kv(text.hashes[:last])[:, layer].swapaxes(0, 1)  # [num_kv_heads, last, 2, head_dim]
    q = values.queries(text, first, last)[:, layer].transpose(1, 2, 0, 3)  # [num_kv_heads, group_size, n, head_dim]
    is_seen = np.arange(last) <= np.arange(first, last)[:, None]
    expected = _attend(q, kv[:, None, :, 0], kv[:, None, :, 1], is_seen, scale).transpose(2, 0, 1, 3)
    assert _is_close(out, expected), f"layer {layer}: wrong output of a prefill"


def check_decode(
    values: Values, text: Text, layer: int, length: int, windows: np.ndarray, out: np.ndarray, scale: float
) -> None:
    """The last token attends to its windows ``[num_kv_heads, n]``, -1 padded; `out [num_kv_heads, group_size, D]`."""
    position = (windows[:, :, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).reshape(len(windows), -1)
    is_seen = (position >= 0) & (position < length)
    kv = values.kv_of_heads(text.hashes[np.clip(position, 0, length - 1)], layer)
    q = values.queries(text, length - 1, length)[0, layer]
    expected = _attend(q, kv[:, :, 0], kv[:, :, 1], is_seen[:, None], scale)
    assert _is_close(out, expected), f"layer {layer}: wrong output of a decode step"


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, is_seen: np.ndarray, scale: float) -> np.ndarray:
    """Softmax attention of q ``[..., n, head_dim]`` to k and v ``[..., tokens, head_dim]``."""
    logits = np.where(is_seen, scale * (q @ k.swapaxes(-1, -2)), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ v


def _is_close(out: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(out - expected).max() < TOLERANCE)  # not where anything is NaN
