"""The engine on the tensors of a GPU that is not there: devices and copies, not values.

Tensors of the device are fake: torch checks what it would on a GPU, and refuses to read them on the host. Kernels, the
attention library and streams are stand-ins that check what they are given.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sglang_freekv.attention.gpu as gpu_attention
from freekv_kernels import REFERENCE, Ops
from sglang_freekv.algorithm.engine import build_engine
from sglang_freekv.algorithm.inputs import DecodeInput, ExtendInput
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory import host_store
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.kv_memory import KVMemory

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the engine itself")

PAGE, NUM_LAYERS = 32, 3
GEOMETRY = Geometry(NUM_LAYERS, num_qo_heads=6, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16, key_bits=2)
IN_CPU_MEMORY = {"host_kv"}  # arguments, and fields of them, that kernels read over the link


def tensors_of(arguments: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


class FakeGPU(TorchDispatchMode):
    """Runs ops on fake tensors where a CUDA device is named or used; refuses those for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        devices = {x.device.type for x in tensors_of(leaves)}
        targets = {x.type for x in leaves if isinstance(x, torch.device)}
        if "cuda" not in devices | targets:
            return func(*args, **kwargs)
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if is_copy and len(devices | targets) == 2:
            assert "cpu" not in targets, "the host waits for the device"
            source = args[0] if targets else args[1]
            assert source.numel() == 0 or getattr(source, "pinned", False), f"pageable memory is copied by {func}"
        with self._fake:
            return func(*args, **kwargs)


class Wrapper:
    """FlashInfer's wrappers, of either sort."""

    def __init__(self, workspace: torch.Tensor, *args: object, **buffers: object) -> None:
        assert all(tensor.is_cuda for tensor in tensors_of((workspace, buffers)))

    def reset_workspace_buffer(self, *buffers: torch.Tensor) -> None:
        assert all(tensor.is_cuda for tensor in buffers)

    def plan(self, *args: object, **kwargs: object) -> None: ...

    def run(self, q: torch.Tensor, kv: torch.Tensor, **kwargs: object) -> torch.Tensor:
        assert q.is_cuda and kv.is_cuda
        assert q._is_view(), "queries are copied in front of attention"
        out = torch.empty_like(q)
        return (out, q.new_empty(q.shape[:2], dtype=torch.float32)) if kwargs.get("return_lse") else out

    def forward_return_lse(self, q: torch.Tensor, *kv: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, ...]:
        assert all(tensor.is_cuda for tensor in kv)
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


def kernel(name: str, reference) -> object:
    """A stand-in for an op: every tensor is on the device, but those that are read over the link."""
    names = inspect.signature(reference).parameters

    def call(*args: object, **kwargs: object) -> torch.Tensor:
        for argument, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            fields = value._asdict() if hasattr(value, "_asdict") else {argument: value}
            for field, part in fields.items():
                for tensor in tensors_of(part):
                    assert tensor.is_cuda == (field not in IN_CPU_MEMORY), f"{name}: {field} is on {tensor.device}"
        return torch.empty(1, 1, 1, device="cuda")  # scores, where somebody looks at it

    return call


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    def pin(tensor: torch.Tensor) -> torch.Tensor:
        tensor.pinned = True
        return tensor

    def allocate(num_bytes: int) -> SimpleNamespace:
        return SimpleNamespace(tensor=torch.empty(num_bytes, dtype=torch.uint8))

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    for name, value in {
        "_lazy_init": lambda: None,
        "Stream": MagicMock(),
        "Event": MagicMock(),
        "current_stream": MagicMock(),
        "stream": lambda _: nullcontext(),
        "get_device_properties": lambda _: SimpleNamespace(multi_processor_count=132),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithRaggedKVCacheWrapper"):
        monkeypatch.setattr(gpu_attention, name, Wrapper)
    for name in ("fast_decode_plan", "merge_state_in_place"):
        monkeypatch.setattr(gpu_attention, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(host_store, "PinnedMemory", allocate)
    with FakeGPU() as mode:
        yield mode


def qkv(num_tokens: int) -> list[torch.Tensor]:
    """Slices of a fused projection."""
    fused = torch.empty(num_tokens, 10, 64, dtype=torch.bfloat16, device="cuda")
    return list(fused.split([6, 2, 2], 1))


@pytest.mark.parametrize("sliding_windows", [(), (70, None, 20)])
@pytest.mark.parametrize("dense_layers", [(), (1,), (0, 1, 2)])
def test_every_op_gets_tensors_of_its_device_and_the_host_waits_for_none(
    gpu: FakeGPU, dense_layers, sliding_windows
) -> None:
    config = FreeKVConfig(
        budget_tokens=4 * PAGE, sink_tokens=PAGE, recent_tokens=PAGE, arena_tokens=4 * PAGE, dense_layers=dense_layers
    )
    ops = Ops(*(kernel(name, getattr(REFERENCE, name)) for name in Ops._fields))
    sizes = {"num_host_pages": 60, "num_blocks": 200, "max_requests": 4, "max_context": 32 * PAGE}
    geometry = replace(GEOMETRY, sliding_windows=sliding_windows)
    memory = KVMemory(geometry, config, **sizes, device="cuda", ops=ops)
    decode, prefill = build_engine(memory)
    memory.admit(1, 3 * PAGE)
    req_to_token = torch.empty(5, 32 * PAGE, dtype=torch.int32, device="cuda")
    sinks = torch.empty(6, device="cuda") if sliding_windows else None
    rows, lens = torch.empty(2, 2, dtype=torch.int64, device="cuda")

    for prefixes, chunk in (([0, 0], 300), ([300, 300], 4), ([9 * PAGE, 0], 40)):
        slots = torch.empty(2 * chunk, dtype=torch.int64, device="cuda")
        prefill.plan(ExtendInput(rows, slots, req_to_token, [1, 2], prefixes, [chunk, chunk], [True, False]))
        for layer in range(NUM_LAYERS):
            assert prefill.run(layer, *qkv(2 * chunk), 0.1, sinks).is_cuda
    for length, in_graph in ((65, False), (320, False), (321, False), (321, True)):
        decode.plan(DecodeInput(rows, lens, rows[:1], req_to_token, [1], [length]), in_graph)
        for layer in range(NUM_LAYERS):
            assert decode.run(layer, *qkv(2), 0.1, sinks).is_cuda
