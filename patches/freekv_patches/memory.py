"""Pools: sizes, the token pool and the request pool.

SGLang profiles the device, derives one token capacity from it and builds its pools for that. Here tokens are bounded
by the host store and requests by the device blocks, and both pools are ours. No registry reaches these steps.
"""

from __future__ import annotations

from freekv_patches.patch import HookType, Patch, freekv_config

_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"


def resolve_memory_pool_config(original, self, pre_model_load_memory):
    resolved = original(self, pre_model_load_memory)
    if (config := freekv_config(self.server_args)) is not None:
        from sglang_freekv.serving.pool_sizes import plan_for

        plan = plan_for(self, config, pre_model_load_memory, resolved.max_running_requests)
        # The configurator has slots; SGLang's arguments take names with an underscore after they are resolved.
        self.server_args._freekv_plan = plan
        resolved.max_total_num_tokens, resolved.max_running_requests = plan.num_tokens, plan.max_requests
    return resolved


def build_default_req_pool(original, self, *, max_num_reqs, extra_max_context_len):
    if (config := freekv_config(self.server_args)) is None:
        return original(self, max_num_reqs=max_num_reqs, extra_max_context_len=extra_max_context_len)
    from sglang_freekv.serving.kv_pool import FreeKVReqToTokenPool

    max_context_len = self.model_config.context_len + extra_max_context_len
    return FreeKVReqToTokenPool(config, max_num_reqs, max_context_len, self.device)


def build_kv_pool(original, self, **kwargs):
    if freekv_config(self.server_args) is None:
        return original(self, **kwargs)
    from sglang_freekv.serving.kv_pool import FreeKVPool
    from sglang_freekv.serving.pool_sizes import max_context_of

    # Handed over once: /server_info dumps whatever the arguments carry.
    plan = vars(self.server_args).pop("_freekv_plan")
    layers = self.layer_info
    return FreeKVPool(plan, max_context_of(self), self.device, layers.start_layer, layers.end_layer)


PATCHES = (
    Patch(
        target=f"{_CONFIGURATOR}._resolve_memory_pool_config",
        kind=HookType.AROUND,
        hook=resolve_memory_pool_config,
        signature="(self, pre_model_load_memory: 'int') -> 'MemoryPoolConfig'",
        reason="tokens are bounded by the host store, running requests by the device blocks",
        remove_when="SGLang sizes pools through a registered configurator",
    ),
    Patch(
        target=f"{_CONFIGURATOR}._build_default_req_pool",
        kind=HookType.AROUND,
        hook=build_default_req_pool,
        signature="(self, *, max_num_reqs: 'int', extra_max_context_len: 'int') -> 'ReqToTokenPool'",
        reason="a request that takes a row starts its window; no callback tells so",
        remove_when="ReqToTokenPool.register_on_alloc_rows (it is in 0.5.23) tells the requests, not only their rows",
    ),
    Patch(
        target=f"{_CONFIGURATOR}._build_mha_kv_pool",
        kind=HookType.AROUND,
        hook=build_kv_pool,
        signature="(self, *, max_total_num_tokens: 'int', mha_pool_class: 'type', quant_method=None) -> 'KVCache'",
        reason="the KV pool has no registry, and a platform's pool class gets no server arguments",
        remove_when="SGLang builds its KV pool from a registry",
    ),
    Patch(
        target=f"{_CONFIGURATOR}._build_oot_mha_kv_pool",
        kind=HookType.AROUND,
        hook=build_kv_pool,
        signature={"0.5.17": "(self, *, max_total_num_tokens: 'int') -> 'KVCache'"},
        reason="a platform's pool class gets no server arguments, so it cannot tell plain SGLang from FreeKV",
        remove_when="0.5.17 is no longer served",
    ),
)
