"""Phase attention: FlashInfer over the windows, over the whole context, and its top-k, at the sizes of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.kernels import REHEARSED_SIZES, SIZES, build_inputs, measure_peak
from benchmarks.gpu.session import Session
from benchmarks.gpu.timing import Stopwatch
from sglang_freekv.attention.base import DecodeAttention
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.testing.kernel_inputs import KernelInputs


def run(session: Session) -> None:
    stopwatch = Stopwatch(session.device)
    peak = measure_peak(session, stopwatch)
    for batch_size, context in REHEARSED_SIZES if session.is_rehearsal else SIZES:
        if not session.has_time(6, f"batch {batch_size}, context {context}"):
            break
        inputs = build_inputs(session, batch_size, context)
        measure_attention(session, stopwatch, inputs, peak)
        inputs.memory.unpin()
        del inputs  # before the next, which are as large


def measure_attention(session: Session, stopwatch: Stopwatch, inputs: KernelInputs, peak: float) -> None:
    """Attention over the windows, and what it stands beside: FlashInfer over the whole context, and its top-k."""
    g, batch, width, device = inputs.geometry, inputs.batch_size, inputs.width, session.device
    attention = window_attention(g, batch, width, device)
    block_kv = inputs.layer.store.block_kv.normal_()
    attention.plan([width] * inputs.num_rows)
    attention.last_page_len.fill_(g.page_size)
    num_entries = inputs.num_rows * width
    attention.kv_indices[:num_entries] = torch.randperm(len(block_kv), device=device)[:num_entries].int()
    q = torch.randn((batch, g.num_kv_heads, g.group_size, g.head_dim), device=device).to(g.dtype)
    scale = g.head_dim**-0.5
    timing = stopwatch.time(lambda: attention.run(q, block_kv, scale))
    _record_attention(session, "window", timing, num_entries * g.block_bytes, inputs, peak)
    if not session.is_rehearsal:
        call, num_bytes = full_attention(g, inputs.context_tokens, q.view(batch, -1, g.head_dim))
        _record_attention(session, "full, FlashInfer", stopwatch.time(call), num_bytes, inputs, peak)
        import flashinfer

        scores = torch.randn((inputs.num_rows, inputs.num_pages), device=device)
        timing = stopwatch.time(lambda: flashinfer.top_k(scores, width), in_graph=False)
        _record_attention(session, "FlashInfer top_k of pooled scores", timing, scores.nbytes, inputs, peak)


def window_attention(geometry: Geometry, max_requests: int, max_pages: int, device: str) -> DecodeAttention:
    """The engine's: FlashInfer's, or torch's on a CPU."""
    if device == "cpu":
        from sglang_freekv.attention.cpu import TorchWindowAttention

        return TorchWindowAttention(geometry, max_requests, max_pages)
    from sglang_freekv.attention.gpu import FlashInferWindowAttention, allocate_float_workspace

    workspace = allocate_float_workspace(geometry, device)
    return FlashInferWindowAttention(geometry, max_requests, max_pages, device, workspace)


def full_attention(g: Geometry, context: int, q: torch.Tensor) -> tuple[Callable[[], torch.Tensor], int]:
    """FlashInfer's decode over every token, in pages of one token, as plain SGLang calls it; and the bytes it reads.

    Parameters
    ----------
    q : model dtype, ``[batch_size, num_qo_heads, head_dim]``
    """
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    batch, device = len(q), q.device
    kv = torch.empty((2, batch * context, 1, g.num_kv_heads, g.head_dim), dtype=g.dtype, device=device).normal_()
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=device) * context
    indices = torch.arange(batch * context, dtype=torch.int32, device=device)
    ones = torch.ones(batch, dtype=torch.int32, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(512 << 20, dtype=torch.uint8, device=device),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=indptr.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=ones.clone(),
    )
    wrapper.plan(indptr, indices, ones, g.num_qo_heads, g.num_kv_heads, g.head_dim, 1, q_data_type=g.dtype)
    return lambda: wrapper.run(q, (kv[0], kv[1])), kv.nbytes


def _record_attention(
    session: Session, kind: str, timing: Any, num_bytes: int, inputs: KernelInputs, peak: float
) -> None:
    rate = num_bytes / timing.median / 1e9
    session.record(
        "attention_time",
        round(timing.median * 1e6, 2),
        "us",
        kind=kind,
        batch=inputs.batch_size,
        context=inputs.context_tokens,
        p20=round(timing.p20 * 1e6, 2),
        p80=round(timing.p80 * 1e6, 2),
        gbytes_per_s=round(rate, 1),
        share_of_peak=round(rate / peak, 3),
    )
