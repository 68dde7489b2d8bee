"""What this machine and its installation are."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from sglang_freekv.memory.pinned import free_container_bytes
from sglang_freekv.memory.units import in_words

_PACKAGES = ("sglang-freekv", "sglang", "torch", "triton", "flashinfer-python", "transformers", "prometheus-client")


def describe_machine() -> list[str]:
    """Lines on the system, its memory and its GPUs."""
    memory, in_container = psutil.virtual_memory(), free_container_bytes()
    is_limited = in_container is not None and in_container < memory.total  # the kernel's "no limit" is a number, too
    limit = f"; this container may still take {in_words(in_container)}" if is_limited else ""
    num_cpus = len(os.sched_getaffinity(0))
    return [
        f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}",
        f"{num_cpus} CPUs, {in_words(memory.total)} of memory, {in_words(memory.available)} free{limit}",
        *(_describe_gpus() or ["no GPU that torch can use"]),
    ]


def describe_packages() -> list[str]:
    """Lines on the installed packages; torch says for which CUDA it is built."""
    builds = {"torch": f", for CUDA {torch.version.cuda}" if torch.version.cuda else ", without CUDA"}
    return [f"{name:<18} {_version_of(name)}{builds.get(name, '')}" for name in _PACKAGES]


def _describe_gpus() -> list[str]:
    lines = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        lines.append(
            f"GPU {index}: {p.name}, {in_words(p.total_memory)}, compute capability {p.major}.{p.minor}, "
            f"{p.multi_processor_count} multiprocessors"
        )
    return lines


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
