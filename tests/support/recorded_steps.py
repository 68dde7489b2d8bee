"""What a CUDA graph does, on a CPU: record the ops of one decode step, and run them again with the same arguments.

A replayed step sees new values only through tensors at the same addresses. Whatever an op was told by a Python number,
or through another tensor, stays what it was when the step was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from freekv_kernels import Ops
from sglang_freekv.algorithm.decode import Decode
from sglang_freekv.algorithm.inputs import DecodeInput
from sglang_freekv.memory.layers import WINDOWED
from tests.support.reference_checks import Request
from tests.support.simulated_requests import SimulatedEngine


class RecordingEngine(SimulatedEngine):
    """A simulated engine whose decode steps are replays of one step, recorded before there was any request.

    As with SGLang's graphs, it is recorded for a fixed batch size on rows of padding, and smaller batches are padded.
    """

    def record(self) -> None:
        g, size = self.geometry, self.memory.max_requests
        shape = (size * g.num_kv_heads, g.group_size, self.memory.max_pages)
        self.memory.tables._scores = [torch.zeros(shape), torch.zeros(shape)]  # at fixed addresses, as on a GPU
        heads = (g.num_qo_heads, g.num_kv_heads, g.num_kv_heads)
        self._qkv = [torch.randn(g.num_layers, size, n, g.head_dim, dtype=g.dtype) for n in heads]
        self._calls: list[Callable[[], torch.Tensor | None]] = []
        self._plan_padded([])
        with self._recording(self.decoder):
            for layer in range(g.num_layers):
                self.decoder.run(layer, *(x[layer] for x in self._qkv), self.scale)

    def plan_decode(self, requests: list[Request]) -> None:
        self._plan_padded(requests)
        for layer in range(self.geometry.num_layers):
            tokens = [request.trace.tokens(layer, request.length - 1, request.length) for request in requests]
            for buffer, values in zip(self._qkv, zip(*tokens, strict=True), strict=True):
                buffer[layer, : len(requests)] = torch.cat(values)
        outputs = [call() for call in self._calls]
        self._outputs = [out.flatten(1, 2)[: len(requests)] for out in outputs if out is not None]

    def run_decode(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self._outputs[layer]

    def _plan_padded(self, requests: list[Request]) -> None:
        rows, lens = [r.row for r in requests], [r.length for r in requests]
        padding = self.memory.max_requests - len(requests)
        slots = self.req_to_token[self._tensor(rows), self._tensor(lens) - 1].long()
        padded_rows, padded_lens = self._tensor([*rows, *[0] * padding]), self._tensor([*lens, *[1] * padding])
        self.decoder.plan(DecodeInput(padded_rows, padded_lens, slots, self.req_to_token, rows, lens), in_graph=True)

    @contextmanager
    def _recording(self, decode: Decode) -> Iterator[None]:
        memory, attention = decode.memory, decode.attentions[WINDOWED]
        ops, run = memory.ops, attention.run
        memory.ops = Ops(*(self._recorded(op, returns=False) for op in ops))
        attention.run = self._recorded(run, returns=True)
        try:
            yield
        finally:
            memory.ops, attention.run = ops, run

    def _recorded(self, call: Callable, returns: bool) -> Callable:
        """Call, and note the call for replays; only attention returns something that is not at a fixed address."""

        def record(*args, **kwargs):
            def replay() -> torch.Tensor | None:
                out = call(*args, **kwargs)
                return out if returns else None

            self._calls.append(replay)
            return call(*args, **kwargs)

        return record
