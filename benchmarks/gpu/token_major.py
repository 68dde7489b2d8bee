"""The ablation of the head-major host store: recall from a token-major one, one run of head_dim elements per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_NUM_PROGRAMS = 64  # as recall_blocks


@triton.jit
def _recall_token_major_kernel(
    host_kv_ptr,
    keys_ptr,
    count_ptr,
    block_kv_ptr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    count = tl.load(count_ptr)
    token, d = tl.arange(0, PAGE_SIZE)[:, None], tl.arange(0, HEAD_DIM)[None, :]
    for miss in range(tl.program_id(0), count, tl.num_programs(0)):
        key = tl.load(keys_ptr + miss)
        page, head = key // NUM_KV_HEADS, key % NUM_KV_HEADS
        for part in tl.static_range(2):
            source = ((page * 2 + part) * PAGE_SIZE + token) * NUM_KV_HEADS + head
            tile = tl.load(host_kv_ptr + source * HEAD_DIM + d)
            target = (miss * 2 + part) * PAGE_SIZE + token
            tl.store(block_kv_ptr + target * HEAD_DIM + d, tile)


def recall_token_major(host_kv: torch.Tensor, keys: torch.Tensor, count: torch.Tensor, block_kv: torch.Tensor) -> None:
    """Copy (page, head) pairs: block_kv[i] = host_kv[page, :, :, head].

    Parameters
    ----------
    host_kv : model dtype, ``[num_pages, 2, page_size, num_kv_heads, head_dim]``, CPU (pinned)
        One layer.
    keys : int64, ``[capacity]``, device
    count : int32, ``[1]``, device
    block_kv : model dtype, ``[>= count, 2, page_size, head_dim]``, device
    """
    _, _, page_size, num_kv_heads, head_dim = host_kv.shape
    _recall_token_major_kernel[(_NUM_PROGRAMS,)](
        host_kv,
        keys,
        count,
        block_kv,
        NUM_KV_HEADS=num_kv_heads,
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        num_warps=4,
    )
