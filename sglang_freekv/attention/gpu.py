"""Attention on a GPU: FlashInfer's paged decode and ragged prefill, on tensor cores, with split KV.

Every run of a rank is in one stream, so all wrappers share one float workspace, which holds the parts of a split within
a run. An int workspace holds a plan until the next one, so every wrapper has its own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper, merge_state_in_place
from flashinfer.decode import fast_decode_plan

from freekv_kernels import add_sinks
from sglang_freekv.attention.base import DecodeAttention, PrefillAttention, indptr_of
from sglang_freekv.attention.prefix_pieces import PrefixPiece
from sglang_freekv.memory.geometry import GPU_GROUP_SIZE, GPU_HEAD_DIMS, Geometry


def float_workspace_bytes(geometry: Geometry, num_sms: int) -> int:
    """Bytes that no plan of this module exceeds, on a GPU with `num_sms` multiprocessors.

    FlashInfer splits KV for a grid of at most 2 blocks per multiprocessor, each with a float32 part of tile x (head_dim
    + 1) per query head. Prefill has tiles of 128 queries (64 from head_dim 256). Decode has tiles of 16, and in graphs
    reserves up to 2 tiles for each of the rows, which are fewer than that grid where it splits.
    """
    prefill_queries = 2 * num_sms * (128 if geometry.head_dim < 256 else 64)
    decode_queries = 2 * 2 * num_sms * 16
    queries = max(prefill_queries, decode_queries)
    return 4 * geometry.group_size * queries * (geometry.head_dim + 1) + 64  # alignment


def allocate_float_workspace(geometry: Geometry, device: str) -> torch.Tensor:
    """The float workspace that all attention objects of a rank share."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return torch.zeros(float_workspace_bytes(geometry, num_sms), dtype=torch.uint8, device=device)


def decode_int_workspace_bytes(num_rows: int, num_sms: int) -> int:
    """Bound on what a decode plan writes: 13 bytes per block of the grid, and 8 per row."""
    num_blocks = 2 * max(num_rows, num_sms)
    return 13 * num_blocks + 8 * num_rows + 1024


def prefill_int_workspace_bytes(geometry: Geometry, num_tokens: int, num_requests: int, num_sms: int) -> int:
    """Bound on what a prefill plan writes, with the tiles of FA2 (16 packed queries or more) or FA3 (128 queries)."""
    fa2 = 13 * (num_tokens * geometry.group_size // 16 + num_requests + 2 * num_sms) + 4 * (num_tokens + num_requests)
    fa3 = 28 * geometry.num_qo_heads * (num_tokens // 128 + num_requests) + 4 * num_sms
    return max(fa2, fa3) + 1024


class FlashInferWindowAttention(DecodeAttention):
    """Decode attention on FlashInfer, one wrapper per number of rows, for eager runs and CUDA graphs alike.

    With few rows KV is split, over a grid that depends on their number alone, so that a graph captured after one plan
    can be replayed after another. With as many rows as blocks run at a time FlashInfer would not split: the plan then
    is one block per row, whatever the lengths.

    Parameters
    ----------
    workspace : uint8, device
        From `allocate_float_workspace`.
    """

    def __init__(
        self,
        geometry: Geometry,
        max_requests: int,
        max_pages: int,
        device: str,
        workspace: torch.Tensor,
        *,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__(geometry, max_requests, max_pages, device, sliding_window=sliding_window)
        check_supported(geometry)
        self._logits = logits_of(geometry, sliding_window)
        self._workspace = workspace
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._wrappers: dict[int, BatchDecodeWithPagedKVCacheWrapper] = {}
        self._copied = torch.cuda.Event()
        # In place of last_page_len, which is on the device: the plan only takes its length.
        self._full_pages = torch.full((len(self.last_page_len),), geometry.page_size, dtype=torch.int32)

    def _plan_rows(self, num_rows: int, indptr: torch.Tensor) -> None:
        is_split = num_rows < 2 * self._num_sms
        # The last plan's copy from pinned memory, which this one overwrites, is long done; but nothing else says so.
        self._copied.synchronize()
        if num_rows not in self._wrappers:
            self._wrappers[num_rows] = self._new_wrapper(num_rows, is_split)
        elif is_split:
            g, full_pages = self.geometry, self._full_pages[:num_rows]
            fast_decode_plan(
                self._wrappers[num_rows],
                indptr,
                self.kv_indices,
                full_pages,
                g.group_size,
                1,
                g.head_dim,
                g.page_size,
                q_data_type=g.dtype,
                sm_scale=1.0,
                **self._logits,
                global_override_indptr_cpu=indptr,
            )
        self._copied.record()

    def _new_wrapper(self, num_rows: int, is_split: bool) -> BatchDecodeWithPagedKVCacheWrapper:
        """A wrapper that reads this object's page lists, planned for them; waits for the device, once per size."""
        g = self.geometry
        kv_indptr, last_page_len = self.kv_indptr[: num_rows + 1], self.last_page_len[:num_rows]
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=is_split,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=kv_indptr,
            paged_kv_indices_buffer=self.kv_indices,
            paged_kv_last_page_len_buffer=last_page_len,
            backend="fa2",
        )
        size = decode_int_workspace_bytes(num_rows, self._num_sms)
        int_workspace = torch.empty(size, dtype=torch.uint8, device=self._workspace.device)
        wrapper.reset_workspace_buffer(self._workspace, int_workspace)
        # For graphs the wrapper copies into its buffers: the same tensors are left alone, and no indices are no copy.
        # Otherwise it keeps the tensors themselves, as they are on its device.
        wrapper.plan(
            kv_indptr,
            self.kv_indices[:0] if is_split else self.kv_indices,
            last_page_len,
            g.group_size,
            1,
            g.head_dim,
            g.page_size,
            q_data_type=g.dtype,
            sm_scale=1.0,
            **self._logits,
            disable_split_kv=not is_split,
        )
        return wrapper

    def run(
        self,
        q: torch.Tensor,
        block_kv: torch.Tensor,
        scale: float,
        kv_indptr: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if kv_indptr is not None:
            # A plan for longer rows holds. FlashInfer 0.6.15 (BatchPrefillWithPagedKVCacheDevice in
            # attention/prefill.cuh) takes lengths from this buffer, and cuts each tile of the plan to them: min(start,
            # kv_len), min(end, kv_len). A tile that nothing is left of writes 0 with a log-sum-exp of -5e4, its
            # "infinity", which has no weight when the tiles of a row are merged; rows have one query, so that the
            # number of tiles, which it counts by the shorter length, is the stride of nothing.
            self.kv_indptr[: self.num_rows + 1].copy_(kv_indptr)
        # A dependent launch would read last_page_len before the kernel in front, which may write it, has ended.
        wrapper = self._wrappers[self.num_rows]
        given = (q.flatten(0, 1), block_kv.unsqueeze(3))
        if sinks is None:
            return wrapper.run(*given, q_scale=scale, enable_pdl=False).view(q.shape)
        out, lse = wrapper.run(*given, q_scale=scale, enable_pdl=False, return_lse=True)
        return add_sinks(out.view(q.shape), lse.view(q.shape[:3]) * math.log(2), sinks)


class _Part(NamedTuple):
    """Pieces of a group that are next to each other both in the batch and in the arena."""

    tokens: slice  # of the batch
    arena: slice
    wrapper: BatchPrefillWithRaggedKVCacheWrapper


class FlashInferPrefillAttention(PrefillAttention):
    """Prefill attention on FlashInfer.

    The state is the output so far, in the model dtype, and its log-sum-exp to base 2; it is updated in place.

    Parameters
    ----------
    workspace : uint8, device
        From `allocate_float_workspace`.
    """

    def __init__(self, geometry: Geometry, workspace: torch.Tensor) -> None:
        check_supported(geometry)
        self.geometry, self._workspace, self._logits = geometry, workspace, logits_of(geometry, None)
        self._num_sms = torch.cuda.get_device_properties(workspace.device).multi_processor_count
        self._wrappers: list[BatchPrefillWithRaggedKVCacheWrapper] = []
        self._int_bytes = 0  # of each wrapper
        self._copied = torch.cuda.Event()

    def plan(self, extend_lens: list[int], groups: list[list[PrefixPiece]]) -> None:
        """Prepare for a batch; pieces of the same lengths, as of a long prefix, share a wrapper."""
        # The last plan's copies from pinned memory, which this one overwrites or frees.
        self._copied.synchronize()
        bounds = indptr_of(extend_lens).tolist()
        size = prefill_int_workspace_bytes(self.geometry, bounds[-1], len(extend_lens), self._num_sms)
        if size > self._int_bytes:
            self._wrappers, self._int_bytes = [], 1 << size.bit_length()
        planned: dict[tuple, BatchPrefillWithRaggedKVCacheWrapper] = {}
        self._chunk = self._planned(planned, extend_lens, extend_lens, causal=True)
        self._parts: list[list[_Part]] = []
        for group in groups:
            parts = []
            for run in adjacent_pieces(group):
                first, last = run[0], run[-1]
                q_lens = extend_lens[first.request : last.request + 1]
                wrapper = self._planned(planned, q_lens, [piece.num_tokens for piece in run], causal=False)
                tokens = slice(bounds[first.request], bounds[last.request + 1])
                parts.append(_Part(tokens, slice(first.first_token, last.first_token + last.num_tokens), wrapper))
            self._parts.append(parts)
        self._copied.record()

    def _planned(
        self, planned: dict, q_lens: list[int], kv_lens: list[int], causal: bool
    ) -> BatchPrefillWithRaggedKVCacheWrapper:
        """The wrapper planned for these lengths."""
        key = tuple(q_lens), tuple(kv_lens), causal
        if key not in planned:
            if len(planned) == len(self._wrappers):
                wrapper = BatchPrefillWithRaggedKVCacheWrapper(self._workspace, "NHD")
                int_workspace = torch.empty(self._int_bytes, dtype=torch.uint8, device=self._workspace.device)
                wrapper.reset_workspace_buffer(self._workspace, int_workspace)
                self._wrappers.append(wrapper)
            g, wrapper = self.geometry, self._wrappers[len(planned)]
            q_indptr, kv_indptr = indptr_of(q_lens), indptr_of(kv_lens)
            heads = g.num_qo_heads, g.num_kv_heads, g.head_dim
            wrapper.plan(q_indptr, kv_indptr, *heads, causal=causal, q_data_type=g.dtype, **self._logits)
            planned[key] = wrapper
        return planned[key]

    def attend_chunk(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Unlike `run`, `forward` takes a scale with each call.
        return self._chunk.forward_return_lse(q, k, v, causal=True, sm_scale=scale, **self._logits)

    def attend_prefix(
        self, state: tuple[torch.Tensor, torch.Tensor], q: torch.Tensor, group: int, arena: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = state
        for tokens, rows, wrapper in self._parts[group]:
            k, v = arena[rows].unbind(1)
            part = wrapper.forward_return_lse(q[tokens], k, v, sm_scale=scale, **self._logits)
            merge_state_in_place(*map(self._by_group, (out[tokens], lse[tokens], *part)))
        return state

    def _by_group(self, tensor: torch.Tensor) -> torch.Tensor:
        """View ``[tokens, num_qo_heads, ...]`` with a group as the heads: the merge has a thread for each head."""
        return tensor.view(-1, self.geometry.group_size, *tensor.shape[2:])

    def finish(self, state: tuple[torch.Tensor, ...], sinks: torch.Tensor | None = None) -> torch.Tensor:
        out, lse = state[:2]
        return out if sinks is None else add_sinks(out, lse * math.log(2), sinks)


def adjacent_pieces(group: list[PrefixPiece]) -> list[list[PrefixPiece]]:
    """Cut a group where a request has no piece, or where the arena has a gap behind a partial page."""
    runs: list[list[PrefixPiece]] = []
    for piece in group:
        last = runs[-1][-1] if runs else None
        if last and (last.request + 1, last.first_token + last.num_tokens) == (piece.request, piece.first_token):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def logits_of(geometry: Geometry, sliding_window: int | None) -> dict[str, Any]:
    """What FlashInfer is to make of logits, in a plan and in the runs of it; it counts the tokens before the query."""
    return {
        "window_left": -1 if sliding_window is None else sliding_window - 1,
        "logits_soft_cap": geometry.logit_cap,
    }


def check_supported(geometry: Geometry) -> None:
    """Raise ValueError where FlashInfer has no kernel."""
    g = geometry
    if g.head_dim not in GPU_HEAD_DIMS or g.group_size > GPU_GROUP_SIZE or g.dtype.itemsize != 2:
        raise ValueError(
            f"FreeKV: no attention on a GPU for head_dim {g.head_dim}, {g.group_size} query heads per KV head and "
            f"{g.dtype}; supported are head_dim {GPU_HEAD_DIMS}, up to {GPU_GROUP_SIZE}, float16 and bfloat16"
        )
