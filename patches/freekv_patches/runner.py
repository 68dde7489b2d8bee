"""Batches on their way to the model.

A ForwardBatch does not say which request has more prompt to come, the eager runner sizes its input buffers by
`max_total_num_tokens`, which here counts host tokens, on a GPU some models write K and V to the pool themselves, and
graphs are captured on a stream that does not come before those beside it.
"""

from __future__ import annotations

import torch

from freekv_patches.patch import HookType, Patch, freekv_config

_ARGUMENTS = (
    "(self, batch: 'Optional[ScheduleBatch]', forward_batch: 'Optional[ForwardBatch]' = None, "
    "pp_proxy_tensors: 'Optional[PPProxyTensors]' = None, is_verify: 'bool' = False, "
    "skip_attn_backend_init: 'Optional[bool]' = None, *, capture_hidden_mode: 'Optional[CaptureHiddenMode]' = None"
)


def forward_batch_generation(original, self, batch, *args, **kwargs):
    if freekv_config(self.server_args) is None or batch is None:
        return original(self, batch, *args, **kwargs)
    backend, forward_mode = self.model_runner.attn_backend, batch.forward_mode
    backend.begin_batch(batch)
    result = original(self, batch, *args, **kwargs)
    backend.end_batch(forward_mode)
    return result


def init_eager_runner(original, self, model_runner, **kwargs):
    if freekv_config(model_runner.server_args) is None:
        return original(self, model_runner, **kwargs)
    host_tokens = model_runner.max_total_num_tokens
    # The runner takes the larger of this and what one prefill batch may hold.
    model_runner.max_total_num_tokens = min(host_tokens, model_runner.model_config.context_len)
    try:
        return original(self, model_runner, **kwargs)
    finally:
        model_runner.max_total_num_tokens = host_tokens


def enable_fused_set_kv_buffer(original, forward_batch):
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

    from sglang_freekv.serving.kv_pool import FreeKVPool

    return not isinstance(get_token_to_kv_pool(), FreeKVPool) and original(forward_batch)


def capture_above_side_streams(original, stream=None):
    """Capture on a stream of higher priority than side streams have, which is CUDA's lowest.

    CUDA copies a stream's priority to the kernels that it captures, and torch has graphs run by the priorities of their
    kernels, not by that of the stream that replays them.
    """
    from sglang.srt.runtime_context import get_server_args

    if stream is None and freekv_config(get_server_args()) is not None:
        stream = torch.cuda.Stream(priority=-1)
    return original(stream)


PATCHES = (
    Patch(
        target="sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        kind=HookType.AROUND,
        hook=forward_batch_generation,
        signature={
            "0.5.17": f"{_ARGUMENTS}) -> 'GenerationBatchResult'",
            "0.5.23": f"{_ARGUMENTS}, return_kv_loc_plan: 'bool' = False) -> 'GenerationBatchResult'",
        },
        reason="the first window is selected at the end of a prompt, and the audit runs after each batch",
        remove_when="ForwardBatch tells unfinished prompts from finished ones",
    ),
    Patch(
        target="sglang.srt.model_executor.runner.eager_runner.EagerRunner.__init__",
        kind=HookType.AROUND,
        hook=init_eager_runner,
        signature={
            "0.5.17": "(self, model_runner: 'ModelRunner') -> 'None'",
            "0.5.23": "(self, model_runner: 'ModelRunner', *, run_warmup: 'bool' = True) -> 'None'",
        },
        reason="its static buffers take 48 bytes per host token otherwise",
        remove_when="the eager runner sizes its buffers by the largest batch",
    ),
    Patch(
        target="sglang.srt.models.utils.enable_fused_set_kv_buffer",
        kind=HookType.AROUND,
        hook=enable_fused_set_kv_buffer,
        signature="(forward_batch: 'ForwardBatch')",
        reason="models fuse rotary embedding with a write to a token-major pool, which does not exist here",
        remove_when="SGLang asks the pool whether it takes such writes",
    ),
    Patch(
        target="sglang.srt.distributed.parallel_state.graph_capture",
        kind=HookType.AROUND,
        hook=capture_above_side_streams,
        signature="(stream=None)",
        reason="decode would share the GPU evenly with what runs beside it and is not waited for",
        remove_when="SGLang lets an attention backend choose the stream of its graphs",
    ),
)
