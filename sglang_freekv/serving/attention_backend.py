"""SGLang's attention backend: plan once per batch, run per layer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_parallel

from sglang_freekv.algorithm.audit import AuditError, audit_blocks, audit_index, audit_windows
from sglang_freekv.algorithm.engine import build_engine
from sglang_freekv.algorithm.inputs import DecodeInput, ExtendInput
from sglang_freekv.releases import release
from sglang_freekv.serving.debug_dump import DebugDump
from sglang_freekv.serving.health import audited
from sglang_freekv.serving.kv_pool import FreeKVPool
from sglang_freekv.serving.layer_check import check_layer, check_layers, refuse

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_freekv.algorithm.decode import Decode
    from sglang_freekv.algorithm.prefill import Prefill


class FreeKVAttentionBackend(AttentionBackend):
    """Decode through `Decode`, extend through `Prefill`. Registered under the names of SGLang's own backends.

    A model with a layer that asks for other attention is refused with UnsupportedConfiguration, before any graph.

    With CUDA graphs, SGLang captures the runs of a decode step, and calls `init_forward_metadata_out_graph` before each
    replay. The scheduler may change its request table while the graph runs: what a step reads of it is copied there.

    What a forward leaves beside it is waited for after its logits, by a hook on the module that computes them, so in
    eager forwards and in the captured graph alike.
    """

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        pool = model_runner.token_to_kv_pool
        if not isinstance(pool, FreeKVPool):
            raise RuntimeError(f"FreeKV: expected a FreeKVPool as KV pool, got {type(pool).__name__}")
        self.memory = pool.memory
        # Models ask the backend for both pools.
        self.token_to_kv_pool, self.req_to_token_pool = pool, model_runner.req_to_token_pool
        # SGLang builds the request pool before the token pool; here, both exist.
        self.req_to_token_pool.memory = pool.memory
        self.decode, self.prefill = build_engine(self.memory)
        self._first_layer, self._context_len = pool.start_layer, model_runner.model_config.context_len
        layers = (module for module in model_runner.model.modules() if isinstance(module, RadixAttention))
        self._checked_layers = check_layers(layers, self.memory.geometry, self._first_layer, self._context_len)
        for module in model_runner.model.modules():
            if isinstance(module, LogitsProcessor):
                module.register_forward_hook(self._finish)
        folder = self.memory.config.debug_dump
        self._dump = DebugDump(Path(folder), self.memory, get_parallel().tp_rank) if folder else None
        self._rows: list[int] = []
        self._unfinished_rid: str | None = None

    def begin_batch(self, batch: ScheduleBatch) -> None:
        """Note what a ForwardBatch does not say: rows on the host, and which request has more prompt to come."""
        self._rows = [release.row_of(req) for req in batch.reqs]
        self._unfinished_rid = batch.chunked_req.rid if batch.chunked_req is not None else None
        if self._dump is not None:
            self._dump.begin_batch(batch.reqs)

    def _finish(self, *_) -> None:
        """Wait for what runs beside the forward, of either phase; once is enough."""
        self.decode.finish()
        self.prefill.finish()

    def end_batch(self, forward_mode) -> None:
        """Dump and audit what the batch left behind, if asked to."""
        self._finish()  # a model that pools has no logits
        self._rows = []  # warm-up forwards have no requests
        is_asked = self._dump is not None or self.memory.config.audit
        if not is_asked or forward_mode.is_idle():
            return
        is_decode = forward_mode.is_decode()
        if is_decode:
            plan = self.decode.last_plan
            slots, groups, requests = plan.batch.slots, plan.batch.groups, (plan.batch, plan.flags)
        else:
            plan = self.prefill.last_plan
            slots, groups, requests = plan.slots, plan.ended_groups, (plan.completed,)
        if self._dump is not None:
            self._dump.end_batch(*requests)
        if self.memory.config.audit:
            with audited(self.memory.counters, partial(self._save_evidence, requests)):
                audit_blocks(self.memory)
                audit_index(self.memory, slots // self.memory.geometry.page_size, groups)
                if is_decode:
                    audit_windows(self.decode)

    def _save_evidence(self, requests: tuple, error: AuditError) -> None:
        """Dump every request of a batch whose audit failed."""
        if self._dump is not None:
            self._dump.write_failure(error, *requests)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan a batch that runs without a graph."""
        if forward_batch.forward_mode.is_decode():
            self._plan_decode(forward_batch, in_graph=False)
        elif forward_batch.forward_mode.is_extend():
            rids = forward_batch.rids or []
            self.prefill.plan(
                ExtendInput(
                    rows=forward_batch.req_pool_indices,
                    slots=forward_batch.out_cache_loc,
                    req_to_token=self.req_to_token_pool.req_to_token,
                    rows_cpu=self._rows or [0] * forward_batch.batch_size,
                    prefix_lens=list(forward_batch.extend_prefix_lens_cpu),
                    extend_lens=list(forward_batch.extend_seq_lens_cpu),
                    is_final=[rid != self._unfinished_rid for rid in rids] or [False] * forward_batch.batch_size,
                )
            )

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Plan a decode batch before its graph is captured or replayed."""
        self._plan_decode(forward_batch, in_graph=True)

    def _plan_decode(self, forward_batch: ForwardBatch, in_graph: bool) -> None:
        num_requests = len(self._rows)
        step = DecodeInput(
            rows=forward_batch.req_pool_indices,
            seq_lens=forward_batch.seq_lens,
            slots=forward_batch.out_cache_loc,
            req_to_token=self.req_to_token_pool.req_to_token,
            rows_cpu=self._rows,
            seq_lens_cpu=forward_batch.seq_lens_cpu[:num_requests].tolist(),
        )
        self.decode.plan(step, in_graph)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing to allocate: the tables of a step have fixed addresses, with or without graphs."""
        if max_bs > self.memory.max_requests:
            raise RuntimeError(
                f"FreeKV: CUDA graphs for {max_bs} requests, but the pools are for {self.memory.max_requests}; "
                f"lower --cuda-graph-max-bs"
            )

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs) -> torch.Tensor:
        return self._run(self.decode, q, k, v, layer, save_kv_cache, kwargs)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs) -> torch.Tensor:
        return self._run(self.prefill, q, k, v, layer, save_kv_cache, kwargs)

    def _run(
        self,
        phase: Decode | Prefill,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        save_kv_cache: bool,
        extras: dict,
    ) -> torch.Tensor:
        sinks = extras.pop("sinks", None)
        self._check_call(layer, k, save_kv_cache, extras)
        head_dim, num_heads = layer.qk_head_dim, (layer.tp_q_head_num, layer.tp_k_head_num, layer.tp_v_head_num)
        # Gemma 3 has a dimension in front.
        heads = [x.reshape(-1, number, head_dim) for x, number in zip((q, k, v), num_heads, strict=True)]
        if padding := self.memory.geometry.head_dim - head_dim:
            heads = [torch.nn.functional.pad(x, (0, padding)) for x in heads]
        sinks = None if sinks is None else sinks.float()
        out = phase.run(layer.layer_id - self._first_layer, *heads, layer.scaling, sinks)
        return out[..., :head_dim].flatten(1)

    def _check_call(self, layer: RadixAttention, k: torch.Tensor | None, save_kv_cache: bool, extras: dict) -> None:
        """Raise UnsupportedConfiguration where a model asks for more than softmax(q k) v over what a layer sees."""
        if layer not in self._checked_layers:  # a model may hide its layers in a dictionary
            check_layer(layer, self.memory.geometry, self._first_layer, self._context_len)
            self._checked_layers.add(layer)
        asked = [name for name, value in extras.items() if value is not None]
        if k is None or not save_kv_cache:
            asked.append("keys and values that another layer or kernel has stored")
        refuse(layer, asked)

    def support_triton(self) -> bool:
        return self.memory.device != "cpu"
