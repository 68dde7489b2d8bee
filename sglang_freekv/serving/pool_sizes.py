"""Memory plan from SGLang's view of the model and the machine."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from sglang.srt.runtime_context import get_parallel, get_schedule
from sglang.srt.utils.common import get_cpu_ids_by_node

from sglang_freekv.config import FreeKVConfig, UnsupportedConfiguration
from sglang_freekv.memory.geometry import Geometry, stored_head_dim
from sglang_freekv.memory.pinned import free_container_bytes, free_host_bytes
from sglang_freekv.memory.plan import MemoryPlan, plan_memory
from sglang_freekv.memory.units import GIB, in_words
from sglang_freekv.releases import release
from sglang_freekv.serving.model_windows import sliding_windows

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.server_args import ServerArgs

# Of the free host memory of a GPU machine, or of a container; the rest is for the system, the page cache and staging.
_HOST_SHARE = 0.8
# Without a GPU one memory is host and device: the store gets the larger part, as blocks are a cache over it.
_CPU_HOST_SHARE = 0.6
# FlashInfer's plans: some tens of KiB for each batch size and each piece of a prefix.
_PLANS_BYTES = 64 << 20


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
    server_args = release.settings_of(configurator.server_args)
    check_host_memory(config, free_host_bytes(), ranks_of_replica(server_args))
    free_bytes = configurator._profile_available_bytes(pre_model_load_memory)
    geometry = geometry_of(configurator, config)
    max_context, workspaces = None, 0
    if configurator.device == "cpu":
        # SGLang has asked for what a NUMA node has free, as it expects a rank on each.
        free_bytes *= min(len(get_cpu_ids_by_node()), ranks_of_machine(server_args))
        device_bytes, host_bytes = divide_cpu_memory(free_bytes, free_container_bytes(), server_args)
    else:
        device_bytes, host_bytes = free_bytes, share_of_host(free_host_bytes(), server_args)
        max_context = max_context_of(configurator)
        workspaces = _attention_bytes(geometry, configurator.gpu_id)
    plan = plan_memory(
        geometry,
        config,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        max_requests=max_requests,
        max_total_tokens=get_schedule().max_total_tokens,
        max_context=max_context,
        attention_bytes=workspaces,
    )
    return _agree(plan, server_args.tp_size)


def share_of_host(free_bytes: int, server_args: ServerArgs) -> int:
    """Bytes of the host store of each rank on this machine, next to a GPU."""
    return int(free_bytes * _HOST_SHARE) // ranks_of_machine(server_args)


def divide_cpu_memory(free_bytes: int, in_container: int | None, server_args: ServerArgs) -> tuple[int, int]:
    """Bytes of a rank without a GPU for blocks and for its host store, of those that a machine has free for all ranks.

    `in_container` is what its container may still take: SGLang asks the machine, not the container.
    """
    share = free_bytes // ranks_of_machine(server_args)
    if in_container is not None:
        share = min(share, share_of_host(in_container, server_args))
    host_bytes = int(share * _CPU_HOST_SHARE)
    return share - host_bytes, host_bytes


def ranks_of_replica(server_args: ServerArgs) -> int:
    """Ranks of tensor parallelism on this machine: they measure what is free before any of them takes it."""
    return max(server_args.tp_size // server_args.nnodes, 1)


def ranks_of_machine(server_args: ServerArgs) -> int:
    """Ranks on this machine: with ``--dp-size`` every replica has its own, and each rank its own memory."""
    return max(server_args.dp_size * server_args.tp_size // server_args.nnodes, 1)


def check_host_memory(config: FreeKVConfig, free_bytes: int, num_ranks: int) -> None:
    """Raise UnsupportedConfiguration where the user asks for larger host stores than the machine has memory for."""
    if config.host_memory_gib is None:
        return
    if (asked := int(config.host_memory_gib * GIB) * num_ranks) > free_bytes:
        raise UnsupportedConfiguration(
            f"The host stores of {num_ranks} rank(s) take {in_words(asked)}, but {in_words(free_bytes)} of "
            f"CPU memory are free; lower --freekv-host-memory, which counts for each rank."
        )


def geometry_of(configurator: KVCacheConfigurator, config: FreeKVConfig) -> Geometry:
    """Shape of this rank's KV cache."""
    return geometry_of_model(
        configurator.model_config,
        config,
        num_layers=configurator.layer_info.num_effective_layers,
        tp_size=get_parallel().attn_tp_size,
        device=configurator.device,
        dtype=configurator.kv_cache_dtype,
        page_size=configurator.pool_page_size,
    )


def geometry_of_model(
    model: ModelConfig,
    config: FreeKVConfig,
    *,
    num_layers: int,
    tp_size: int,
    device: str,
    dtype: torch.dtype,
    page_size: int,
) -> Geometry:
    """Shape of the KV cache of one of `tp_size` ranks."""
    return Geometry(
        num_layers=num_layers,
        num_qo_heads=model.num_attention_heads // tp_size,
        num_kv_heads=model.get_num_kv_heads(tp_size),
        head_dim=stored_head_dim(model.head_dim, device),
        dtype=dtype,
        page_size=page_size,
        key_bits=config.key_bits,
        sliding_windows=sliding_windows(model) or (),
        logit_cap=getattr(model.hf_text_config, "attn_logit_softcapping", None) or 0.0,
    )


def max_context_of(configurator: KVCacheConfigurator) -> int:
    """Most tokens of a request: the request table's width, as one that has ended takes part in one more step."""
    return table_width(configurator.model_config, configurator.server_args, configurator.pool_page_size)


def table_width(model: ModelConfig, server_args: ServerArgs, page_size: int) -> int:
    """Tokens of a row of SGLang's request table."""
    return whole_lines(model.context_len + release.extra_context_len(server_args), page_size)


def whole_lines(num_tokens: int, page_size: int) -> int:
    """Round up to whole cache lines of the tables by page, which kernels then read with 16-byte accesses."""
    step = 16 * page_size
    return -(-num_tokens // step) * step


def _attention_bytes(geometry: Geometry, gpu_id: int) -> int:
    return attention_bytes(geometry, torch.cuda.get_device_properties(gpu_id).multi_processor_count)


def attention_bytes(geometry: Geometry, num_sms: int) -> int:
    """FlashInfer's workspaces on a GPU with so many multiprocessors."""
    from sglang_freekv.attention.gpu import float_workspace_bytes

    return float_workspace_bytes(geometry, num_sms) + _PLANS_BYTES


def _agree(plan: MemoryPlan, tp_size: int) -> MemoryPlan:
    """Take the minimum over the ranks: their schedulers stay in step only with equal capacities."""
    if tp_size == 1:
        return plan
    from sglang.srt.distributed.parallel_state import get_world_group

    sizes = torch.tensor([plan.num_pages, plan.num_blocks, plan.max_requests])
    torch.distributed.all_reduce(sizes, torch.distributed.ReduceOp.MIN, group=get_world_group().cpu_group)
    num_pages, num_blocks, max_requests = sizes.tolist()
    return dataclasses.replace(plan, num_pages=num_pages, num_blocks=num_blocks, max_requests=max_requests)
