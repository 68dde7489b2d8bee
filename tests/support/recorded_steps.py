"""Decode steps that are replays of one, recorded before there was any request: by a CUDA graph; on a CPU, op by op.

A replayed step sees new values only through tensors at the same addresses. Whatever an op was told by a Python number,
or through another tensor, stays what it was when the step was recorded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from freekv_kernels import Ops
from sglang_freekv.algorithm.decode import Decode
from sglang_freekv.algorithm.inputs import DecodeInput
from tests.support.reference_checks import Request
from tests.support.simulated_requests import SimulatedEngine


class ReplayingEngine(SimulatedEngine):
    """As with SGLang's graphs, a step is recorded for a fixed batch size, of padding; smaller batches are padded."""

    def record(self) -> None:
        g, size = self.geometry, self.memory.max_requests
        heads = (g.num_qo_heads, g.num_kv_heads, g.num_kv_heads)
        shape = {"dtype": g.dtype, "device": self.device}
        self._qkv = [torch.randn(g.num_layers, size, n, g.head_dim, **shape) for n in heads]
        self._plan_padded([])
        self._record()

    @abstractmethod
    def _record(self) -> None:
        """Record the planned step, by `_run_layers`."""

    @abstractmethod
    def _replay(self) -> list[torch.Tensor]:
        """Run it again; the outputs of the layers, with those of padding."""

    def _run_layers(self) -> list[torch.Tensor]:
        layers = range(self.geometry.num_layers)
        outputs = [self.decoder.run(layer, *(x[layer] for x in self._qkv), self.scale) for layer in layers]
        self.decoder.finish()
        return outputs

    def plan_decode(self, requests: list[Request]) -> None:
        self._plan_padded(requests)
        for layer in range(self.geometry.num_layers):
            tokens = [request.trace.tokens(layer, request.length - 1, request.length) for request in requests]
            for buffer, values in zip(self._qkv, zip(*tokens, strict=True), strict=True):
                buffer[layer, : len(requests)] = torch.cat(values)
        self._outputs = [out[: len(requests)].clone() for out in self._replay()]

    def run_decode(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self._outputs[layer]

    def _plan_padded(self, requests: list[Request]) -> None:
        rows, lens = [r.row for r in requests], [r.length for r in requests]
        padding = self.memory.max_requests - len(requests)
        slots = self.req_to_token[self._tensor(rows), self._tensor(lens) - 1].long()
        padded_rows, padded_lens = self._tensor([*rows, *[0] * padding]), self._tensor([*lens, *[1] * padding])
        self.decoder.plan(DecodeInput(padded_rows, padded_lens, slots, self.req_to_token, rows, lens), in_graph=True)


class GraphEngine(ReplayingEngine):
    """On a GPU: a step is captured after two that run, on a stream above the side streams, as on a server."""

    def _record(self) -> None:
        stream, self._graph = torch.cuda.Stream(priority=-1), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run_layers()
            with torch.cuda.graph(self._graph, stream=stream):
                self._captured = self._run_layers()
        torch.cuda.current_stream().wait_stream(stream)

    def _replay(self) -> list[torch.Tensor]:
        self._graph.replay()
        return self._captured


class RecordingEngine(ReplayingEngine):
    """On a CPU, which it is also for: what a replay does with the arguments of the step that was recorded."""

    def _record(self) -> None:
        g = self.geometry
        shape = (self.memory.max_requests * g.num_kv_heads, g.group_size, self.memory.max_pages)
        self.memory.tables._scores = [torch.zeros(shape), torch.zeros(shape)]  # at fixed addresses, as on a GPU
        self._calls: list[Callable[[], torch.Tensor | None]] = []
        with self._recording(self.decoder):
            self._run_layers()

    def _replay(self) -> list[torch.Tensor]:
        outputs = [call() for call in self._calls]
        return [out.flatten(1, 2) for out in outputs if out is not None]

    @contextmanager
    def _recording(self, decode: Decode) -> Iterator[None]:
        memory, ops = decode.memory, decode.memory.ops
        runs = {attention: attention.run for attention in decode.attentions.values()}
        memory.ops = Ops(*(self._recorded(op, returns=False) for op in ops))
        for attention, run in runs.items():
            attention.run = self._recorded(run, returns=True)
        try:
            yield
        finally:
            memory.ops = ops
            for attention, run in runs.items():
                attention.run = run

    def _recorded(self, call: Callable, returns: bool) -> Callable:
        """Call, and note the call for replays; only attention returns something that is not at a fixed address."""

        def record(*args, **kwargs):
            def replay() -> torch.Tensor | None:
                out = call(*args, **kwargs)
                return out if returns else None

            self._calls.append(replay)
            return call(*args, **kwargs)

        return record
