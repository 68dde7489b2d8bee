"""The memory plan of a server that is not started: its arguments as SGLang resolves them, its model from headers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import psutil
import torch

from sglang_freekv.config import FreeKVConfig, UnsupportedConfiguration
from sglang_freekv.doctor.arguments import server_arguments
from sglang_freekv.doctor.capacity import Rank, best_fit, free_before_weights
from sglang_freekv.doctor.checkpoint import Weights, check_path, not_found, weights_of
from sglang_freekv.flags import take_options
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.pinned import free_container_bytes, free_host_bytes
from sglang_freekv.memory.plan import MemoryPlan
from sglang_freekv.memory.units import in_words
from sglang_freekv.releases import release
from sglang_freekv.serving import pool_sizes, support
from sglang_freekv.serving.model_support import check_model

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

_NUM_SMS = 132  # of an H100 or H200, where there is no GPU to ask
_LARGEST_FRACTION = 0.9  # of a GPU for weights and KV that we propose: the rest holds activations and graphs
_SHORT = 8192  # tokens of a request, for which we propose a smaller host store where the default one does not fit
_WEIGHTS_SHARE = 0.75  # of a GPU, at most, where we propose how many to take


@dataclass(frozen=True)
class Machine:
    """Where the server would run; None: as on this machine."""

    gpu_bytes: int | None = None
    host_bytes: int | None = None
    weights_bytes: int | None = None  # of the whole model

    @property
    def device(self) -> str:
        return "cuda" if self.gpu_bytes is not None or torch.cuda.is_available() else "cpu"

    @property
    def total_gpu_bytes(self) -> int:
        return self.gpu_bytes or torch.cuda.get_device_properties(0).total_memory

    @property
    def free_host_bytes(self) -> int:
        return free_host_bytes() if self.host_bytes is None else self.host_bytes


@dataclass(frozen=True)
class Forecast:
    """What would happen."""

    model: ModelConfig
    config: FreeKVConfig
    weights: Weights
    weights_bytes: int  # of a rank
    reserve_bytes: int  # what SGLang keeps free for activations and graphs
    rank: Rank
    plan: MemoryPlan


def resolve(flags: list[str], machine: Machine) -> tuple[ServerArgs, FreeKVConfig]:
    """Resolve a server's flags as its start would; nothing is loaded.

    Raises
    ------
    UnsupportedConfiguration
        If there is no model, the parser does not take a flag, or FreeKV refuses something; says why.
    Exception
        Whatever SGLang's own code refuses something with.
    """
    from sglang.srt.server_args import ServerArgs

    config, raw = take_options(server_arguments(flags) | {"kv_retrieval": "freekv"})
    check_path(raw["model_path"])
    if machine.device == "cuda" and raw["device"] is None and raw["attention_backend"] is None:
        raw |= {"device": "cuda", "attention_backend": "flashinfer"}
    raw = support.preset(raw)
    _check_model(raw, config)
    with _capacity(machine):
        given = ServerArgs.from_cli_args(argparse.Namespace(**raw))
        release.resolve(given)
    server_args = release.settings_of(given)
    support.check_settings(server_args, config)
    if server_args.device == "cuda":
        check = support.check_kernels if machine.gpu_bytes is not None else support.check_gpu
        check(server_args, release.model_of(server_args))
    return server_args, config


def class_of(model: ModelConfig) -> str:
    """Name of the class that SGLang serves a model with.

    Raises
    ------
    ValueError
        If it has none; says so.
    """
    from sglang.srt.model_loader.utils import get_model_architecture

    return get_model_architecture(model)[1]


def forecast(server_args: ServerArgs, config: FreeKVConfig, machine: Machine) -> Forecast:
    """Plan the memory of a rank with what its model and the machine would leave.

    Raises
    ------
    UnsupportedConfiguration
        If it does not fit; says which flag to change.
    """
    model, device = release.model_of(server_args), server_args.device
    pool_sizes.check_host_memory(config, machine.free_host_bytes, pool_sizes.ranks_of_machine(server_args))
    weights = weights_of(model, machine.weights_bytes)
    weights_bytes = weights.num_bytes // server_args.tp_size
    geometry = pool_sizes.geometry_of_model(
        model,
        config,
        num_layers=model.num_attention_layers,
        tp_size=server_args.tp_size,
        device=device,
        dtype=support.kv_dtype_of(server_args, model),
        page_size=server_args.page_size,
    )
    before = _free_memory(machine) if device == "cpu" else free_before_weights(machine.total_gpu_bytes)
    free_bytes = int(before * server_args.mem_fraction_static) - weights_bytes
    reserve_bytes = before - weights_bytes - free_bytes
    if free_bytes <= 0:
        most = _rank(server_args, model, geometry, machine, int(before * _LARGEST_FRACTION) - weights_bytes)
        raise UnsupportedConfiguration(_no_room(server_args, model, weights.num_bytes, before, most.holds_one(config)))
    rank = _rank(server_args, model, geometry, machine, free_bytes)
    plan = _plan(rank, config, min(_SHORT, model.context_len))
    return Forecast(model, config, weights, weights_bytes, reserve_bytes, rank, plan)


def _check_model(raw: Mapping[str, Any], config: FreeKVConfig) -> None:
    """Refuse a model before SGLang adapts its settings to it, which may end in errors that say nothing of attention.

    Whether its quantization is served depends on the machine, and is left to SGLang.
    """
    from sglang.srt.configs.model_config import ModelConfig

    try:
        with mock.patch.object(ModelConfig, "_verify_quantization", lambda model: None):
            model = ModelConfig(
                raw["model_path"],
                trust_remote_code=raw["trust_remote_code"],
                revision=raw["revision"],
                model_override_args=raw["json_model_override_args"],
                is_embedding=raw["is_embedding"],
                model_impl=raw["model_impl"],
            )
    except OSError as error:
        if Path(raw["model_path"]).exists():
            raise
        raise UnsupportedConfiguration(not_found(raw["model_path"], str(error).partition("\n")[0])) from error
    check_model(model, config)


def _rank(server_args: ServerArgs, model: ModelConfig, geometry: Geometry, machine: Machine, free_bytes: int) -> Rank:
    """What `pool_sizes.plan_for` hands to the plan, for a machine that may not be this one."""
    max_context, workspaces = None, 0
    if server_args.device == "cpu":
        in_container = free_container_bytes() if machine.host_bytes is None else None
        device_bytes, host_bytes = pool_sizes.divide_cpu_memory(free_bytes, in_container, server_args)
    else:
        device_bytes, host_bytes = free_bytes, pool_sizes.share_of_host(machine.free_host_bytes, server_args)
        max_context = pool_sizes.table_width(model, server_args, geometry.page_size)
        workspaces = pool_sizes.attention_bytes(geometry, _num_sms(machine))
    return Rank(
        geometry=geometry,
        plain_token_bytes=geometry.token_bytes * model.head_dim // geometry.head_dim,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        max_requests=_max_requests(server_args, model, free_bytes // geometry.token_bytes),
        max_context=max_context,
        attention_bytes=workspaces,
        max_total_tokens=server_args.max_total_tokens,
    )


def _plan(rank: Rank, config: FreeKVConfig, length: int) -> MemoryPlan:
    """The server's plan; where it fails, say which host store would not, as its summaries lie on the device."""
    try:
        return rank.plan(config)
    except UnsupportedConfiguration as error:
        fit = best_fit(rank, config, length)
        if config.host_memory_gib is not None or not fit.num_requests:
            raise
        raise UnsupportedConfiguration(
            f"{error}. With --freekv-host-memory {fit.host_memory_gib:g} it starts, and holds {fit.num_requests} "
            f"request(s) of {length:,} tokens."
        ) from error


def _no_room(server_args: ServerArgs, model: ModelConfig, weights: int, before: int, a_fraction_helps: bool) -> str:
    """Say that the weights leave nothing for KV, and what would help."""
    tp_size, of_rank = server_args.tp_size, weights // server_args.tp_size
    found = f"The weights take {in_words(of_rank)} of {in_words(before)} on each of {tp_size} rank(s)"
    if a_fraction_helps:
        return (
            f"{found}, and SGLang keeps {1 - server_args.mem_fraction_static:.0%} free: nothing is left for KV. Raise "
            f"--mem-fraction-static from {server_args.mem_fraction_static} towards {_LARGEST_FRACTION}, or --tp-size."
        )
    heads = model.num_attention_heads
    fitting = [n for n in range(tp_size + 1, heads + 1) if not heads % n and weights / n <= _WEIGHTS_SHARE * before]
    ranks = f"--tp-size {fitting[0]} on as many of these GPUs, " if fitting else ""
    return (
        f"{found}: no --mem-fraction-static leaves room for KV. Give {ranks}a GPU of "
        f"{in_words(of_rank / _WEIGHTS_SHARE)} or more, or a smaller or quantized model."
    )


@contextmanager
def _capacity(machine: Machine) -> Iterator[None]:
    """SGLang derives defaults from the size of the GPU that it finds; let it find another."""
    if machine.gpu_bytes is None:
        yield
        return
    with mock.patch(release.GPU_CAPACITY, lambda device=None: machine.gpu_bytes / 2**20):
        yield


def _free_memory(machine: Machine) -> int:
    """What SGLang finds free on a machine without a GPU, whatever a container allows."""
    return psutil.virtual_memory().available if machine.host_bytes is None else machine.host_bytes


def _num_sms(machine: Machine) -> int:
    return _NUM_SMS if machine.gpu_bytes is not None else torch.cuda.get_device_properties(0).multi_processor_count


def _max_requests(server_args: ServerArgs, model: ModelConfig, num_tokens: int) -> int:
    """SGLang's bound on running requests (KVCacheConfigurator.resolve_max_num_reqs)."""
    by_capacity = max(min(int(num_tokens / model.context_len * 512), 4096), 2048)
    return min(server_args.max_running_requests or by_capacity, num_tokens // 2)
