"""The memory plan of a server that is not started: its arguments as SGLang resolves them, its model from headers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import psutil
import torch

from sglang_freekv.config import FreeKVConfig
from sglang_freekv.flags import add_cli_args, take_options
from sglang_freekv.memory.pinned import GIB, free_container_bytes, free_host_bytes
from sglang_freekv.memory.plan import MemoryPlan, plan_memory
from sglang_freekv.memory.units import in_words
from sglang_freekv.serving import pool_sizes, support

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

_CONTEXT_BYTES = GIB // 2  # taken by CUDA and its libraries before the weights are loaded
_NUM_SMS = 132  # of an H100 or H200, where there is no GPU to ask


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
    weights_bytes: int  # of a rank
    reserve_bytes: int  # what SGLang keeps free for activations and graphs
    plan: MemoryPlan


def resolve(flags: list[str], machine: Machine) -> tuple[ServerArgs, FreeKVConfig]:
    """Resolve a server's flags as its start would; nothing is loaded.

    Raises
    ------
    UnsupportedConfiguration, ValueError
        If FreeKV, or SGLang, refuses them; says why.
    SystemExit
        If SGLang's parser does not know one; it has said so.
    """
    from sglang.srt.server_args import ServerArgs

    # Where the plug-in is active, SGLang adds our flags itself.
    parser = argparse.ArgumentParser(prog="doctor", add_help=False, conflict_handler="resolve")
    ServerArgs.add_cli_args(parser)
    add_cli_args(parser)
    arguments = vars(parser.parse_args(flags)) | {"kv_retrieval": "freekv"}
    config, raw = take_options(arguments)
    if machine.device == "cuda" and raw["device"] is None and raw["attention_backend"] is None:
        raw |= {"device": "cuda", "attention_backend": "flashinfer"}
    raw = support.preset(raw)
    with _capacity(machine):
        server_args = ServerArgs.from_cli_args(argparse.Namespace(**raw))
    support.check_settings(server_args, config)
    if server_args.device == "cuda":
        check = support.check_kernels if machine.gpu_bytes is not None else support.check_gpu
        check(server_args, server_args.get_model_config())
    return server_args, config


def forecast(server_args: ServerArgs, config: FreeKVConfig, machine: Machine) -> Forecast:
    """Plan the memory of a rank with what its model and the machine would leave.

    Raises
    ------
    UnsupportedConfiguration, ValueError
        If it does not fit; says which flag to change.
    """
    model, device = server_args.get_model_config(), server_args.device
    pool_sizes.check_host_memory(config, machine.free_host_bytes, pool_sizes.ranks_of_machine(server_args))
    weights_bytes = _weights_bytes(model, machine) // server_args.tp_size
    geometry = pool_sizes.geometry_of_model(
        model,
        config,
        num_layers=model.num_attention_layers,
        tp_size=server_args.tp_size,
        device=device,
        dtype=support.kv_dtype_of(server_args, model),
        page_size=server_args.page_size,
    )
    before = machine.total_gpu_bytes - _CONTEXT_BYTES if device == "cuda" else _free_memory(machine)
    reserve_bytes = int(before * (1 - server_args.mem_fraction_static))
    free_bytes = before - weights_bytes - reserve_bytes
    if free_bytes <= 0:
        raise ValueError(
            f"The weights take {in_words(weights_bytes)} of {in_words(before)} on each rank, and SGLang keeps "
            f"{in_words(reserve_bytes)} free: nothing is left for KV. Raise --mem-fraction-static or --tp-size."
        )
    max_context, workspaces = None, 0
    if device == "cpu":
        in_container = free_container_bytes() if machine.host_bytes is None else None
        device_bytes, host_bytes = pool_sizes.divide_cpu_memory(free_bytes, in_container, server_args)
    else:
        device_bytes, host_bytes = free_bytes, pool_sizes.share_of_host(machine.free_host_bytes, server_args)
        max_context = pool_sizes.table_width(model, server_args, geometry.page_size)
        workspaces = pool_sizes.attention_bytes(geometry, _num_sms(machine))
    plan = plan_memory(
        geometry,
        config,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        max_requests=_max_requests(server_args, model, free_bytes // geometry.token_bytes),
        max_total_tokens=server_args.max_total_tokens,
        max_context=max_context,
        attention_bytes=workspaces,
    )
    return Forecast(model, config, weights_bytes, reserve_bytes, plan)


@contextmanager
def _capacity(machine: Machine) -> Iterator[None]:
    """SGLang derives defaults from the size of the GPU that it finds; let it find another."""
    if machine.gpu_bytes is None:
        yield
        return
    with mock.patch("sglang.srt.server_args.get_device_memory_capacity", lambda device=None: machine.gpu_bytes / 2**20):
        yield


def _weights_bytes(model: ModelConfig, machine: Machine) -> int:
    """Size of the model's weights in memory, from the headers of its files."""
    if machine.weights_bytes is not None:
        return machine.weights_bytes
    from safetensors import safe_open

    files = sorted(Path(model.model_path).glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{model.model_path} has no *.safetensors file to tell the size of the weights; give --weights-gb."
        )
    if model.quantization is not None:
        return sum(file.stat().st_size for file in files)
    num_elements = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            num_elements += sum(torch.Size(tensors.get_slice(name).get_shape()).numel() for name in tensors.keys())  # noqa: SIM118
    return num_elements * model.dtype.itemsize


def _free_memory(machine: Machine) -> int:
    """What SGLang finds free on a machine without a GPU, whatever a container allows."""
    return psutil.virtual_memory().available if machine.host_bytes is None else machine.host_bytes


def _num_sms(machine: Machine) -> int:
    return _NUM_SMS if machine.gpu_bytes is not None else torch.cuda.get_device_properties(0).multi_processor_count


def _max_requests(server_args: ServerArgs, model: ModelConfig, num_tokens: int) -> int:
    """SGLang's bound on running requests (KVCacheConfigurator.resolve_max_num_reqs)."""
    by_capacity = max(min(int(num_tokens / model.context_len * 512), 4096), 2048)
    return min(server_args.max_running_requests or by_capacity, num_tokens // 2)
