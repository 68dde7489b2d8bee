"""Layers of an 8B-shaped model that decode with the engine, without SGLang: its ops and streams, in a CUDA graph."""

from __future__ import annotations

import torch

from benchmarks.gpu.layer_work import LayerWork, NewAttention
from benchmarks.gpu.mid_decode import fill_host_store, map_pages, restart, start_rows
from benchmarks.gpu.session import Session
from benchmarks.gpu.stand_in_attention import StandInAttention
from benchmarks.gpu.timing import hide_host
from freekv_kernels import Count, triton_ops
from sglang_freekv.algorithm.decode import Decode
from sglang_freekv.algorithm.inputs import DecodeInput
from sglang_freekv.algorithm.selectors import SELECTORS
from sglang_freekv.algorithm.stream import SideStreams
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry, num_pages_of
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import WINDOWED


class EngineStack:
    """Requests in mid-decode, and as many layers as the deepest graph needs.

    Parameters
    ----------
    num_steps : int
        Most tokens of a request beyond `context`.
    new_attention : callable
        Makes the attention over the windows.
    """

    def __init__(
        self,
        session: Session,
        batch_size: int,
        context: int,
        num_layers: int,
        num_steps: int,
        new_attention: NewAttention = StandInAttention,
    ) -> None:
        g, config, device = session.shape.geometry(num_layers), session.config, session.device
        self._new_attention = new_attention
        self.batch_size, self.context, self.num_steps, self.device = batch_size, context, num_steps, device
        self.work = LayerWork(session.shape, batch_size, device, g.dtype)
        num_pages = num_pages_of(context + num_steps, g.page_size) + 2
        self.memory = KVMemory(
            g,
            config,
            num_host_pages=1 + batch_size * num_pages,
            num_blocks=self._num_blocks(config, g),
            max_requests=batch_size,
            max_context=num_pages * g.page_size,
            device=device,
            ops=triton_ops(),
        )
        fill_host_store(self.memory)
        shape = (batch_size + 1, num_pages * g.page_size)
        self.req_to_token = torch.zeros(shape, dtype=torch.int32, device=device)
        self.rows = torch.arange(1, batch_size + 1, device=device)

    def _num_blocks(self, config: FreeKVConfig, g: Geometry) -> int:
        return int(config.windows * self.batch_size * config.max_budget_tokens // g.page_size * g.num_kv_heads)

    def start(self, config: FreeKVConfig | None = None) -> None:
        """Requests at their first step, with windows and no graph.

        Parameters
        ----------
        config : FreeKVConfig, optional
            From now on; its selector must read the index that there is.
        """
        memory, g = self.memory, self.memory.geometry
        config = config or memory.config
        restart(memory, config, self._num_blocks(config, g))
        attention = self._new_attention(g, self.batch_size, memory.sizes.width, self.device)
        selector = SELECTORS[memory.config.selector_name](memory)
        streams = SideStreams(self.device)
        self.decode = Decode(memory, {WINDOWED: attention}, {WINDOWED: selector}, streams)
        num_pages = memory.host.num_host_pages - 1
        self.lengths, _ = map_pages(self.req_to_token, self.batch_size, self.context, self.num_steps, num_pages)
        self.seq_lens = self.lengths.to(self.device)
        start_rows(memory, self.decode.selectors, self.req_to_token, self.rows, self.seq_lens)
        per_layer = (g.num_layers, self.batch_size)
        self.q = torch.randn(*per_layer, g.num_qo_heads, g.head_dim, device=self.device).to(g.dtype)
        self.k, self.v = torch.zeros((2, *per_layer, g.num_kv_heads, g.head_dim), dtype=g.dtype, device=self.device)

    def move(self, drift: float) -> None:
        """New tokens: queries whose cosine with those of the step before is 1 - `drift`, keys and values at random."""
        kept = 1 - drift
        self.q.mul_(kept).add_(torch.randn_like(self.q), alpha=(1 - kept**2) ** 0.5)
        self.k.normal_()
        self.v.normal_()

    def plan(self) -> None:
        slots = self.req_to_token[self.rows, self.seq_lens].long()
        self.lengths, self.seq_lens = self.lengths + 1, self.seq_lens + 1
        rows = list(range(1, self.batch_size + 1))
        step = DecodeInput(self.rows, self.seq_lens, slots, self.req_to_token, rows, self.lengths.tolist())
        self.decode.plan(step, in_graph=True)

    def run(self, num_layers: int) -> None:
        """The first layers of a step and the logits, beside which what they have left is done."""
        scale = self.memory.geometry.head_dim**-0.5
        for number in range(num_layers):
            self.work.before_attention()
            out = self.decode.run(number, self.q[number], self.k[number], self.v[number], scale)
            self.work.after_attention(out.flatten(1))
        self.work.compute_logits()
        self.decode.finish()

    def counts(self) -> dict[str, int]:
        """Counters since the last start."""
        return {count.name.lower(): self.memory.counters[count] for count in Count}

    def time_step(self, step: torch.cuda.CUDAGraph | None, num_layers: int) -> tuple[float, float]:
        """Seconds of the plan of a step, and of its layers, on the GPU; on a CPU nothing is timed."""
        if step is None:
            self.plan()
            self.run(num_layers)
            return 0.0, 0.0
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        hide_host()
        marks[0].record()
        self.plan()
        marks[1].record()
        step.replay()
        marks[2].record()
        marks[2].synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3

    def capture(self, num_layers: int) -> torch.cuda.CUDAGraph | None:
        """A graph of the first layers, after a step that has compiled them; None on a CPU."""
        self.plan()
        self.run(num_layers)
        if self.device == "cpu":
            return None
        torch.cuda.synchronize()
        # As SGLang's graphs are: above what runs beside.
        stream, graph = torch.cuda.Stream(priority=-1), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.run(num_layers)
        return graph
