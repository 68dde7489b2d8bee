"""Decode attention in Triton that stands in for FlashInfer's where that is not installed: what it costs to read blocks.

Rows are split, so that few of them fill a GPU too, and their parts are merged by their softmax states. It serves
measurements only: window and full attention are held against each other with the same kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_freekv.attention.base import DecodeAttention

_PROGRAMS = 1024  # enough for any GPU: some seven for each multiprocessor
_MAX_SPLITS = 64  # of a row: they are merged at once
_QUERIES = 16  # the least that a dot takes


@triton.jit
def _attend_part_kernel(
    q_ptr,
    block_kv_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    last_page_len_ptr,
    part_ptr,
    lse_ptr,
    scale_log2,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    row, split, num_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    g, d, token = tl.arange(0, QUERIES), tl.arange(0, DIMS), tl.arange(0, PAGE_SIZE)
    is_query = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + (row * GROUP + g)[:, None] * HEAD_DIM + d[None, :], mask=is_query, other=0.0)
    start, end = tl.load(kv_indptr_ptr + row), tl.load(kv_indptr_ptr + row + 1)
    last_len = tl.load(last_page_len_ptr + row)
    per_split = tl.cdiv(end - start, num_splits)
    first = start + split * per_split
    highest = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, DIMS), tl.float32)
    element = token[:, None] * HEAD_DIM + d[None, :]
    is_element = (d < HEAD_DIM)[None, :] & (token >= 0)[:, None]
    for entry in range(first, tl.minimum(first + per_split, end)):
        block = tl.load(kv_indices_ptr + entry).to(tl.int64)
        k_ptrs = block_kv_ptr + block * (2 * PAGE_SIZE * HEAD_DIM) + element
        k = tl.load(k_ptrs, mask=is_element, other=0.0)
        v = tl.load(k_ptrs + PAGE_SIZE * HEAD_DIM, mask=is_element, other=0.0)
        num_tokens = tl.where(entry == end - 1, last_len, PAGE_SIZE)
        logits = tl.where(token[None, :] < num_tokens, tl.dot(q, tl.trans(k)) * scale_log2, -1e30)
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        weights, kept = tl.exp2(logits - new_highest[:, None]), tl.exp2(highest - new_highest)
        total = total * kept + tl.sum(weights, 1)
        v = tl.where((token < num_tokens)[:, None], v, 0.0)  # what is not written yet may be anything
        out = out * kept[:, None] + tl.dot(weights.to(v.dtype), v)
        highest = new_highest
    is_empty = total == 0
    out = out / tl.where(is_empty, 1.0, total)[:, None]
    part = (row * num_splits + split) * GROUP + g
    tl.store(part_ptr + part[:, None] * HEAD_DIM + d[None, :], out, mask=is_query)
    lse = tl.where(is_empty, -1e30, highest + tl.log2(tl.where(is_empty, 1.0, total)))
    tl.store(lse_ptr + part, lse, mask=g < GROUP)


@triton.jit
def _merge_parts_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row, query, d = tl.program_id(0), tl.program_id(1), tl.arange(0, DIMS)
    part = (row * SPLITS + tl.arange(0, SPLITS)) * GROUP + query
    lse = tl.load(lse_ptr + part)
    weights = tl.exp2(lse - tl.max(lse, 0))
    is_element = (part >= 0)[:, None] & (d < HEAD_DIM)[None, :]
    parts = tl.load(part_ptr + part[:, None] * HEAD_DIM + d[None, :], mask=is_element, other=0.0)
    out = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out_ptr + (row * GROUP + query) * HEAD_DIM + d, out, mask=d < HEAD_DIM)


class StandInAttention(DecodeAttention):
    """Decode attention as a CUDA graph can hold it: the grid depends on the number of rows only."""

    def run(
        self,
        q: torch.Tensor,
        block_kv: torch.Tensor,
        scale: float,
        kv_indptr: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if sinks is not None:
            raise ValueError("the attention that stands in for FlashInfer's has no sinks; expected None")
        g, num_rows = self.geometry, self.num_rows
        indptr = self.kv_indptr if kv_indptr is None else kv_indptr
        num_programs = _PROGRAMS if q.is_cuda else num_rows  # an interpreter runs one after the other
        num_splits = min(_MAX_SPLITS, triton.next_power_of_2(max(1, num_programs // num_rows)))
        q, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype, device=q.device)
        parts = torch.empty((num_rows, num_splits, g.group_size, g.head_dim), device=q.device)
        lse = torch.empty(parts.shape[:-1], device=q.device)
        sizes = {"GROUP": g.group_size, "HEAD_DIM": g.head_dim, "DIMS": triton.next_power_of_2(g.head_dim)}
        _attend_part_kernel[(num_rows, num_splits)](
            q,
            block_kv,
            indptr,
            self.kv_indices,
            self.last_page_len,
            parts,
            lse,
            scale * 1.4426950408889634,  # to base 2
            QUERIES=max(_QUERIES, triton.next_power_of_2(g.group_size)),
            PAGE_SIZE=g.page_size,
            **sizes,
            num_warps=4,
            num_stages=3,
        )
        _merge_parts_kernel[(num_rows, g.group_size)](parts, lse, out, SPLITS=num_splits, **sizes, num_warps=4)
        return out
