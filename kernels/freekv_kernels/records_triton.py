"""Records of the host store in kernels: see `freekv_kernels.records`. CODEC is the name of the codec.

An element is an index into the K and V of a record, ``[2, page_size, head_dim]``, whatever the codec makes of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def record_pointer(host_kv_ptr, page, head, page_stride, head_stride):
    """Where the record of a (host page, KV head) starts, in one layer; `page` is int64."""
    return host_kv_ptr + page * page_stride + head * head_stride


@triton.jit
def load_elements(record_ptr, element, mask, CODEC: tl.constexpr):
    """Elements of a record as the model's numbers; 0 where masked."""
    tl.static_assert(CODEC == "plain", "a codec without a kernel")
    return tl.load(record_ptr + element, mask=mask, other=0.0)


@triton.jit
def store_elements(record_ptr, element, value, mask, CODEC: tl.constexpr):
    """Write elements of a record; returns what they read back as, which is what a block must hold."""
    tl.static_assert(CODEC == "plain", "a codec without a kernel")
    tl.store(record_ptr + element, value, mask=mask)
    return value


@triton.jit
def load_nearest(block_ptr, is_resident, record_ptr, element, mask, CODEC: tl.constexpr):
    """Elements of a pair from its block where it has one, else from its record."""
    tl.static_assert(CODEC == "plain", "a codec without a kernel")
    # Both have one layout: one load, so that all of it is on its way at once.
    return tl.load(tl.where(is_resident, block_ptr, record_ptr) + element, mask=mask, other=0.0)
