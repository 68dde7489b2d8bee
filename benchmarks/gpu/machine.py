"""Phase env: the machine, the link, the versions, and what is free."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.session import Session
from sglang_freekv.memory.pinned import cpus_near, free_container_bytes, free_host_bytes, memory_info, pci_address
from sglang_freekv.memory.units import GIB

_QUERIES = {
    "driver": "driver_version",
    "link_generation": "pcie.link.gen.gpucurrent",
    "link_generation_max": "pcie.link.gen.max",
    "link_width": "pcie.link.width.current",
    "gpu_clock_mhz": "clocks.max.sm",
}
_PACKAGES = ("triton", "flashinfer-python", "sglang-kernel", "transformers")


def run(session: Session) -> None:
    for command in (["nvidia-smi"], ["nvidia-smi", "topo", "-m"], ["nvcc", "--version"], ["lscpu"], ["free", "-g"]):
        session.say(f"$ {' '.join(command)}\n{_output(command)}")
    found = {name: _smi(query) for name, query in _QUERIES.items()} | {name: _version(name) for name in _PACKAGES}
    found["cuda"] = torch.version.cuda
    session.machine.write_text(json.dumps(found))
    session.writer.environment |= found
    session.say(json.dumps(session.writer.environment, indent=1))

    container, total = free_container_bytes(), memory_info()["MemTotal"]
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    session.record("free_host_memory", free_host_bytes() / GIB, "GiB")
    session.record("total_host_memory", total / GIB, "GiB")
    if container is not None and container < total:
        session.record("container_limit_left", container / GIB, "GiB")
    session.record("free_disk", shutil.disk_usage(session.out).free / GIB, "GiB")
    session.record("numa_nodes", nodes, "nodes")
    session.record("cores", len(os.sched_getaffinity(0)), "cores")
    if session.device == "cpu":
        return
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    session.record("gpu_memory_free", free / GIB, "GiB", total=round(total / GIB, 1))
    session.record("multiprocessors", properties.multi_processor_count, "multiprocessors")
    session.record("l2_cache", properties.L2_cache_size / 2**20, "MiB")
    session.record("cores_near_gpu", len(cpus_near(pci_address(0))), "cores")


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not available: {error}"


def _smi(query: str) -> str | None:
    answer = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
    return answer.splitlines()[0] if answer and not answer.startswith("not available") else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
