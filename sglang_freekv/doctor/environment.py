"""What this machine and its installation are."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from sglang_freekv.memory.pinned import free_container_bytes
from sglang_freekv.memory.units import in_words

_PACKAGES = ("sglang-freekv", "sglang", "torch", "triton", "flashinfer-python", "transformers", "prometheus-client")
_ABSENT = "not installed"
# Of a CUDA toolkit, what FlashInfer 0.6.15 asks for where it compiles, at the first batch; and what for.
_TOOLKIT = {
    "bin/nvcc": "it compiles",
    "lib64/libcudart.so": "it links",
    "include/curand_kernel.h": "it compiles prefill for compute capability 9.0, and sampling",
}


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
        *([describe_toolkit()] if torch.cuda.is_available() else []),
    ]


def describe_toolkit() -> str:
    """Whether FlashInfer can compile its kernels: what a server would say much later, in the words of a compiler."""
    if (compiled := _version_of("flashinfer-jit-cache")) != _ABSENT:
        return f"FlashInfer's kernels are compiled already (flashinfer-jit-cache {compiled})"
    folder = _toolkit_folder()
    missing = [f"{path}, with which {what}" for path, what in _TOOLKIT.items() if not (folder / path).exists()]
    if not missing:
        return f"CUDA toolkit {folder}: FlashInfer compiles with it at the first batch, for a minute or more"
    return (
        f"CUDA toolkit {folder}, which FlashInfer would take, lacks {'; '.join(missing)}. Set CUDA_HOME to a complete "
        f"one, or install FlashInfer's compiled kernels (flashinfer-jit-cache, of FlashInfer's own version)"
    )


def _toolkit_folder() -> Path:
    """The one that FlashInfer chooses; the parent of a wrapper script, where that is the nvcc that is found."""
    if given := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(given)
    nvcc = shutil.which("nvcc")
    return Path(nvcc).parents[1] if nvcc else Path("/usr/local/cuda")


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
        return _ABSENT
