"""Every op is tested twice by the same assertions: its reference, and its kernel, on a GPU or in the interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import freekv_kernels


@pytest.fixture(params=["reference", "triton"])
def impl(request: pytest.FixtureRequest) -> SimpleNamespace:
    """`impl.ops`, and `impl.device` for its tensors. Tensors of the host store come from `impl.host(tensor)`."""
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    return SimpleNamespace(
        name=request.param,
        ops=freekv_kernels.triton_ops() if request.param == "triton" else freekv_kernels.REFERENCE,
        device="cuda" if on_gpu else "cpu",
        host=lambda tensor: tensor.pin_memory() if on_gpu else tensor,
    )
