"""The shape of one tensor-parallel rank's KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from freekv_kernels import PLAIN, Codec

# What FlashInfer's kernels multiply: head widths, and query heads per KV head. It has no kernel for 96, and says so
# nowhere: it would leave the last 32 elements of a row out.
GPU_HEAD_DIMS = (64, 128, 256)
GPU_GROUP_SIZE = 16


def stored_head_dim(head_dim: int, device: str) -> int:
    """Width of a head in memory: on a GPU the next one that has a kernel. Zeros change no product."""
    return head_dim if device == "cpu" else min(width for width in GPU_HEAD_DIMS if width >= head_dim)


def num_pages_of(num_tokens: int, page_size: int) -> int:
    """Pages that so many tokens take."""
    return (num_tokens + page_size - 1) // page_size


@dataclass(frozen=True)
class Geometry:
    """Shape of the KV cache of one rank; every size in bytes follows from it."""

    num_layers: int
    num_qo_heads: int  # of the rank
    num_kv_heads: int  # of the rank
    head_dim: int  # as stored
    dtype: torch.dtype
    page_size: int = 32  # tokens per page
    key_bits: int = 0  # of each element of a key, in the codes on the device; 0: no codes
    codec: Codec = PLAIN  # of the records of the host store
    # Tokens that a query sees in each layer, its own included; None: all of them. Empty: all of them in every layer.
    sliding_windows: tuple[int | None, ...] = ()
    logit_cap: float = 0.0  # of attention: its logits become cap * tanh(logit / cap); 0: they stay as they are

    def __post_init__(self) -> None:
        if self.head_dim * self.key_bits % 8:
            raise ValueError(
                f"--freekv-key-bits is {self.key_bits}, no whole bytes for the {self.head_dim} elements of a key; "
                f"give more bits, or 0."
            )

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Numbers of the layers whose queries see all tokens: those that pages may be chosen in."""
        windows = self.sliding_windows or (None,) * self.num_layers
        return tuple(number for number, window in enumerate(windows) if window is None)

    @property
    def places(self) -> dict[int, int]:
        """Number of a full layer -> its place in tensors that have only these."""
        return {number: place for place, number in enumerate(self.full_layers)}

    @property
    def block_bytes(self) -> int:
        """K and V of one (page, KV head) on the device."""
        return 2 * self.page_size * self.head_dim * self.dtype.itemsize

    @property
    def record_bytes(self) -> int:
        """K and V of one (page, layer, KV head) in the host store: what one recall moves."""
        elements = prod(self.codec.record_shape(self.page_size, self.head_dim))
        return elements * self.codec.dtype(self.dtype).itemsize

    @property
    def page_bytes(self) -> int:
        """One page of the host store: all layers and heads."""
        return self.num_layers * self.num_kv_heads * self.record_bytes

    @property
    def token_bytes(self) -> int:
        """KV of one token in the host store, all layers and heads."""
        return self.page_bytes // self.page_size
