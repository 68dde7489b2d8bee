"""SGLang's attention backend: plan once per batch, run per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_freekv.audit import audit_blocks, audit_summaries, audit_windows
from sglang_freekv.kv_pool import FreeKVPool
from sglang_freekv.prefill import Prefill
from sglang_freekv.retrieval import Retrieval

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class FreeKVAttentionBackend(AttentionBackend):
    """Decode through `Retrieval`, extend through `Prefill`. Registered under the names of SGLang's own backends."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        pool = model_runner.token_to_kv_pool
        if not isinstance(pool, FreeKVPool):
            raise RuntimeError(f"FreeKV: expected a FreeKVPool as KV pool, got {type(pool).__name__}")
        self.memory = pool.memory
        self.req_to_token_pool = model_runner.req_to_token_pool
        # SGLang builds the request pool before the token pool; here, both exist.
        self.req_to_token_pool.memory = pool.memory
        self.retrieval, self.prefill = Retrieval(self.memory), Prefill(self.memory)
        self._first_layer = pool.start_layer
        self._unfinished_rid: str | None = None

    def begin_batch(self, batch: ScheduleBatch) -> None:
        """Note which request of the batch has more prompt to come; a ForwardBatch does not say."""
        self._unfinished_rid = batch.chunked_req.rid if batch.chunked_req is not None else None

    def end_batch(self, forward_mode) -> None:
        """Audit what the batch left behind, if asked to."""
        if not self.memory.config.audit or forward_mode.is_idle():
            return
        side = self.retrieval if forward_mode.is_decode() else self.prefill
        audit_blocks(self.memory)
        audit_summaries(self.memory, side.last_plan.slots // self.memory.geometry.page_size)
        if side is self.retrieval:
            audit_windows(self.retrieval)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        rows, req_to_token = forward_batch.req_pool_indices, self.req_to_token_pool.req_to_token
        if forward_batch.forward_mode.is_decode():
            self.retrieval.plan(rows, req_to_token, forward_batch.seq_lens_cpu.tolist())
        elif forward_batch.forward_mode.is_extend():
            is_final = [rid != self._unfinished_rid for rid in forward_batch.rids]
            self.prefill.plan(
                rows,
                req_to_token,
                list(forward_batch.extend_prefix_lens_cpu),
                list(forward_batch.extend_seq_lens_cpu),
                is_final,
            )

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True) -> torch.Tensor:
        return self._run(self.retrieval, q, k, v, layer)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True) -> torch.Tensor:
        return self._run(self.prefill, q, k, v, layer)

    def _run(
        self,
        side: Retrieval | Prefill,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
    ) -> torch.Tensor:
        out = side.run(
            layer.layer_id - self._first_layer,
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim),
            v.reshape(-1, layer.tp_v_head_num, layer.v_head_dim),
            layer.scaling,
        )
        return out.flatten(1)

    def support_triton(self) -> bool:
        return False
