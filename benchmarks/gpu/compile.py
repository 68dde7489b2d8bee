"""Phases compile and compile-tests: FlashInfer's kernels, all at once on all cores, before anybody waits for one."""

from __future__ import annotations

from itertools import product

import torch

from benchmarks.gpu.session import Session
from sglang_freekv.memory.geometry import GPU_HEAD_DIMS

_DTYPES = (torch.bfloat16, torch.float16)


def compile_serving(session: Session) -> None:
    """What a server with the measured models runs: decode, prefill and the merge of its parts, sampling."""
    from flashinfer.jit.cascade import gen_cascade_module
    from flashinfer.jit.page import gen_page_module
    from flashinfer.jit.sampling import gen_sampling_module
    from flashinfer.jit.topk import gen_topk_module

    others = [gen_cascade_module(), gen_sampling_module(), gen_page_module(), gen_topk_module()]
    _build(session, [*_attention(torch.bfloat16, 128), *others])


def compile_for_tests(session: Session) -> None:
    """What the tests that are marked `gpu` run."""
    _build(
        session, [spec for dtype, head_dim in product(_DTYPES, GPU_HEAD_DIMS) for spec in _attention(dtype, head_dim)]
    )


def _attention(dtype: torch.dtype, head_dim: int) -> list:
    """Decode on tensor cores and paged prefill are one module; ragged prefill on Hopper is another.

    Arguments as FlashInfer's wrappers give them: no rotary embedding, no window, no soft cap, no fp16 reduction.
    """
    from flashinfer.jit.attention import gen_batch_prefill_module

    kinds = (dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False, False)
    backends = ["fa2"]
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == 9:
        backends.append("fa3")
    return [gen_batch_prefill_module(backend, *kinds) for backend in backends]


def _build(session: Session, specs: list) -> None:
    from flashinfer.jit.core import build_jit_specs

    session.say(f"compiling {', '.join(spec.name for spec in specs)}")
    if session.is_rehearsal:
        for spec in specs:
            spec.write_ninja()
    else:
        build_jit_specs(specs, verbose=False)
    session.record("compile_seconds", session.seconds - session.left, "s", modules=len(specs))
