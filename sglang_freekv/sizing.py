"""Memory plan from SGLang's view of the model and the machine."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import psutil
import torch
from sglang.srt.runtime_context import get_parallel, get_schedule

from sglang_freekv.config import FreeKVConfig
from sglang_freekv.geometry import Geometry
from sglang_freekv.memory_plan import MemoryPlan, plan_memory

if TYPE_CHECKING:
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

# Of the free host memory of a GPU machine; the rest is for the system, the page cache and pinned staging.
_HOST_SHARE = 0.8
# Without a GPU one memory is host and device: the store gets the larger part, as blocks are a cache over it.
_CPU_HOST_SHARE = 0.6


def plan_for(
    configurator: KVCacheConfigurator, config: FreeKVConfig, pre_model_load_memory: float, max_requests: int
) -> MemoryPlan:
    """Plan this rank's pools; all ranks get the same numbers.

    Parameters
    ----------
    pre_model_load_memory : float
        GiB free on the device before the weights were loaded, as SGLang passes it.
    max_requests : int
        SGLang's own bound on running requests.
    """
    free_bytes = configurator._profile_available_bytes(pre_model_load_memory)
    if configurator.device == "cpu":
        host_bytes = int(free_bytes * _CPU_HOST_SHARE)
        device_bytes = free_bytes - host_bytes
    else:
        ranks = configurator.server_args.tp_size // configurator.server_args.nnodes
        host_bytes = int(psutil.virtual_memory().available * _HOST_SHARE) // ranks
        device_bytes = free_bytes
    plan = plan_memory(
        geometry_of(configurator),
        config,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        max_requests=max_requests,
        max_total_tokens=get_schedule().max_total_tokens,
    )
    return _agree(plan, configurator.server_args.tp_size)


def geometry_of(configurator: KVCacheConfigurator) -> Geometry:
    """Shape of this rank's KV cache."""
    model, tp_size = configurator.model_config, get_parallel().attn_tp_size
    return Geometry(
        num_layers=configurator.layer_info.num_effective_layers,
        num_qo_heads=model.num_attention_heads // tp_size,
        num_kv_heads=model.get_num_kv_heads(tp_size),
        head_dim=model.head_dim,
        dtype=configurator.kv_cache_dtype,
        page_size=configurator.pool_page_size,
    )


def _agree(plan: MemoryPlan, tp_size: int) -> MemoryPlan:
    """Take the minimum over the ranks: their schedulers stay in step only with equal capacities."""
    if tp_size == 1:
        return plan
    from sglang.srt.distributed import get_world_group

    sizes = torch.tensor([plan.num_pages, plan.num_blocks, plan.max_requests])
    torch.distributed.all_reduce(sizes, torch.distributed.ReduceOp.MIN, group=get_world_group().cpu_group)
    num_pages, num_blocks, max_requests = sizes.tolist()
    return dataclasses.replace(plan, num_pages=num_pages, num_blocks=num_blocks, max_requests=max_requests)
