"""The scheduler: its start, with self-check and the longest prompt once everything is built, and `/server_info`.

SGLang logs a plug-in's failure and serves without it, so the scheduler itself checks that every part is ours.
"""

from __future__ import annotations

import logging
import signal

import psutil

from freekv_patches.patch import HookType, Patch, freekv_config
from sglang_freekv.config import UnsupportedConfiguration

logger = logging.getLogger(__name__)

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_ARGUMENTS = "(self, server_args: sglang.srt.server_args.ServerArgs, port_args: sglang.srt.server_args.PortArgs"


def start_scheduler(original, self, server_args, *args, **kwargs):
    if freekv_config(server_args) is None:
        return original(self, server_args, *args, **kwargs)
    from freekv_patches.registry import assert_installed
    from sglang_freekv.serving.self_check import check_parts

    try:
        original(self, server_args, *args, **kwargs)
    except (UnsupportedConfiguration, MemoryError) as refusal:
        logger.error("The server cannot start. %s", refusal)
        psutil.Process().parent().send_signal(signal.SIGQUIT)  # as SGLang does after every other exception
        raise SystemExit(1) from None
    assert_installed()
    check_parts(self)
    # SGLang would accept somewhat longer prompts, which then wait for ever at the head of the queue.
    plan = self.token_to_kv_pool_allocator.get_kvcache().plan
    self.max_req_input_len = min(self.max_req_input_len, plan.max_input_tokens + 1)


def report_internal_state(result, self, recv_req):
    if freekv_config(self.server_args) is not None:
        allocator = self.token_to_kv_pool_allocator
        held = {
            "host_free_tokens": allocator.available_size(),
            "session_tokens": self.pool_stats_observer.session_held_tokens(),
        }
        result.internal_state["freekv"] = allocator.get_kvcache().report() | self.tree_cache.report() | held


PATCHES = (
    Patch(
        target=f"{_SCHEDULER}.__init__",
        kind=HookType.AROUND,
        hook=start_scheduler,
        signature={
            "0.5.17": (
                f"{_ARGUMENTS}, gpu_id: int, tp_rank: int, moe_ep_rank: int, pp_rank: int, attn_cp_rank: int, "
                "moe_dp_rank: int, dp_rank: Optional[int])"
            ),
            "0.5.23": f"{_ARGUMENTS})",
        },
        reason=(
            "a missing patch or pool must end start-up, not serve as plain SGLang; and so must memory that cannot be "
            "had, with a sentence instead of a traceback"
        ),
        remove_when="SGLang ends start-up when a plug-in fails, and has an exception for settings that do not fit",
    ),
    Patch(
        target=f"{_SCHEDULER}.get_internal_state",
        kind=HookType.AFTER,
        hook=report_internal_state,
        signature="(self, recv_req: sglang.srt.managers.io_struct.GetInternalStateReq)",
        reason="/server_info has no registry for sections",
        remove_when="SGLang collects internal state from its pools",
    ),
)
