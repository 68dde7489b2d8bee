"""Self-check of a scheduler: every part that FreeKV replaces is in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_freekv.serving.attention_backend import FreeKVAttentionBackend
from sglang_freekv.serving.kv_pool import FreeKVPool, FreeKVReqToTokenPool

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler


def check_parts(scheduler: Scheduler) -> None:
    """Raise RuntimeError naming each part that is not FreeKV's, or whose size is not the plan's."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    parts = {
        "KV pool": (pool, FreeKVPool),
        "request pool": (scheduler.req_to_token_pool, FreeKVReqToTokenPool),
        "attention backend": (scheduler.tp_worker.model_runner.attn_backend, FreeKVAttentionBackend),
    }
    wrong = [
        f"{name}: expected {expected.__name__}, got {type(part).__name__}"
        for name, (part, expected) in parts.items()
        if not isinstance(part, expected)
    ]
    if not wrong:
        sizes = {
            "tokens of the scheduler": scheduler.max_total_num_tokens,
            "tokens of the allocator": scheduler.token_to_kv_pool_allocator.size,
        }
        wrong = [
            f"{name}: expected {pool.plan.num_tokens}, got {size}"
            for name, size in sizes.items()
            if size != pool.plan.num_tokens
        ]
    if wrong:
        raise RuntimeError("FreeKV is not in place, so the server would not do what was asked: " + "; ".join(wrong))
