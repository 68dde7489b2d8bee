"""CPU memory for the host store: what is free, which CPUs are near the GPU, and pinned memory that kernels read."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from sglang_freekv.memory.units import GIB, in_words

logger = logging.getLogger(__name__)

_ROOT = Path("/")
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MAX_THREADS = 16  # zeroing pages is bound by memory bandwidth beyond that


class _CgroupFiles(NamedTuple):
    limit: str
    usage: str
    page_cache: str  # field of memory.stat: what the kernel gives back under pressure


_CGROUP_V2 = _CgroupFiles("memory.max", "memory.current", "inactive_file")
_CGROUP_V1 = _CgroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_host_bytes(root: Path = _ROOT) -> int:
    """Bytes that this process can still get: the machine's, or the container's where that is less."""
    available = memory_info()["MemAvailable"]
    in_container = free_container_bytes(root)
    return available if in_container is None else min(available, in_container)


def memory_info() -> dict[str, int]:
    """What the kernel says of the machine's memory, bytes: MemTotal, MemAvailable and others of /proc/meminfo."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {name.rstrip(":"): int(kib) << 10 for name, kib, *unit in lines if unit}


def free_container_bytes(root: Path = _ROOT) -> int | None:
    """Limit minus usage of this process's memory cgroup and of those above it; None without a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, files = root / "sys/fs/cgroup", _CGROUP_V2
        elif "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", _CGROUP_V1
        else:
            continue
        # In a container the path may be the host's: then only the mount itself exists, and is the container's.
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
                free.append(_free_in(folder, files))
            if folder == mount:
                break
    return min(free, default=None)


def _free_in(folder: Path, files: _CgroupFiles) -> int:
    limit, usage = int((folder / files.limit).read_text()), int((folder / files.usage).read_text())
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return max(limit - usage + int(stat.get(files.page_cache, 0)), 0)


def cpus_near(pci_address: str, root: Path = _ROOT) -> set[int]:
    """CPUs of the NUMA node of a PCI device among those this process may use.

    All that it may use where there is one node, where the node is unknown, or where none of its CPUs is allowed.

    Parameters
    ----------
    pci_address : str
        For example ``0000:1b:00.0``.
    """
    allowed = os.sched_getaffinity(0)
    nodes = root / "sys/devices/system/node"
    if len(list(nodes.glob("node[0-9]*"))) < 2:
        return allowed
    try:
        node = int((root / "sys/bus/pci/devices" / pci_address / "numa_node").read_text())
        cpus = _parse_cpus((nodes / f"node{node}" / "cpulist").read_text())
    except (OSError, ValueError):
        return allowed
    return cpus & allowed or allowed


def _parse_cpus(text: str) -> set[int]:
    """CPU numbers of a list such as "0-3,8"."""
    runs = [run.split("-") for run in text.strip().split(",") if run]
    return {cpu for run in runs for cpu in range(int(run[0]), int(run[-1]) + 1)}


def pci_address(device: int) -> str:
    """PCI address of a CUDA device, as in /sys/bus/pci/devices."""
    p = torch.cuda.get_device_properties(device)
    return f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"


class CudaDriver:
    """The calls that make memory visible to the GPU."""

    _PORTABLE_AND_MAPPED = 1 | 2
    _DEVICE_POINTER = 3  # CU_POINTER_ATTRIBUTE_DEVICE_POINTER

    def register(self, address: int, num_bytes: int) -> str | None:
        """Pin and map; the error in words, or None."""
        runtime = torch.cuda.cudart()
        return self._error(runtime.cudaHostRegister(address, num_bytes, self._PORTABLE_AND_MAPPED))

    def unregister(self, address: int) -> str | None:
        """Unpin what was registered at `address`, after the GPU has finished; the error in words, or None."""
        torch.cuda.synchronize()
        return self._error(torch.cuda.cudart().cudaHostUnregister(address))

    def device_pointer(self, address: int) -> int | None:
        """Address at which a kernel finds a registered byte: the question that Triton asks of a pointer argument."""
        pointer = ctypes.c_uint64()
        libcuda = ctypes.CDLL("libcuda.so.1")  # torch.cuda.cudart() has no such call
        status = libcuda.cuPointerGetAttribute(
            ctypes.byref(pointer), ctypes.c_int(self._DEVICE_POINTER), ctypes.c_uint64(address)
        )
        return None if status else pointer.value

    def near_cpus(self) -> set[int]:
        """CPUs next to the current device."""
        return cpus_near(pci_address(torch.cuda.current_device()))

    @staticmethod
    def _error(code) -> str | None:
        return torch.cuda.cudart().cudaGetErrorString(code) if int(code) else None


class PinnedMemory:
    """Anonymous memory, registered with CUDA once; kernels read and write it at its host address.

    torch's pinned allocator rounds up to a power of two, which doubles a store just above one.

    Memory is registered in pieces of `piece_bytes`, which kernels see as one range. A copy by the CUDA driver
    (``tensor.to("cuda")``, `copy_`) must stay within one piece.

    Parameters
    ----------
    num_bytes : int
    driver : CudaDriver
    piece_bytes : int
        A multiple of the system's page size.

    Attributes
    ----------
    tensor : uint8, ``[num_bytes]``, CPU; zero
        Keeps the memory; stays valid as CPU memory after `unpin`.

    Raises
    ------
    MemoryError
        If there is not that much, or it cannot be pinned. Nothing stays pinned.
    """

    def __init__(self, num_bytes: int, driver: CudaDriver | None = None, piece_bytes: int = GIB) -> None:
        self._driver = CudaDriver() if driver is None else driver
        self._registered: list[int] = []
        _check_free(num_bytes)
        start = time.perf_counter()
        try:
            # Private: shared memory gets no huge pages by default.
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise _refused(num_bytes, str(error)) from error
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        try:  # a fork would make pages copy-on-write, and the next write here leave the GPU with the old page
            memory.madvise(mmap.MADV_DONTFORK)
        except OSError as error:
            raise MemoryError(
                f"FreeKV: this system cannot keep the host store out of forked processes, after which the GPU would "
                f"read old pages ({error}); use one whose madvise takes MADV_DONTFORK"
            ) from error
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        begin = self.tensor.data_ptr()
        pieces = [(begin + i, min(piece_bytes, num_bytes - i)) for i in range(0, num_bytes, piece_bytes)]
        try:
            self._populate(pieces)
        except OSError as error:
            raise _refused(num_bytes, str(error)) from error
        populated = time.perf_counter()
        try:
            self._register(pieces)
        except MemoryError:
            self.unpin()
            raise
        end = time.perf_counter()
        gib = num_bytes / GIB
        logger.info(
            f"FreeKV: host store: {gib:.1f} GiB pinned in {end - start:.1f} s (populate {populated - start:.1f} s, "
            f"{gib / (populated - start):.1f} GiB/s; register {end - populated:.1f} s, "
            f"{gib / (end - populated):.1f} GiB/s)"
        )

    def unpin(self) -> None:
        """Unpin everything; no kernel may use the memory after this. Repeating it does nothing.

        Memory that is still pinned when the process dies is unpinned by the kernel, which can take a minute.
        """
        while self._registered:
            address = self._registered.pop()
            if (error := self._driver.unregister(address)) is not None:
                logger.warning(f"FreeKV: could not unpin the host store at {address:#x}: {error}")

    def _populate(self, pieces: list[tuple[int, int]]) -> None:
        """Have the kernel back every page now, near the GPU: threads on its CPUs touch them first."""
        cpus = self._driver.near_cpus()
        threads = min(len(cpus), _MAX_THREADS)
        stay_near = (os.sched_setaffinity, (0, cpus))  # 0: of the calling thread only
        with ThreadPoolExecutor(threads, "populate", stay_near[0], stay_near[1]) as pool:
            shares = [share for piece in pieces for share in _split(*piece, threads)]
            list(pool.map(_touch, shares))

    def _register(self, pieces: list[tuple[int, int]]) -> None:
        for address, num_bytes in pieces:
            if (error := self._driver.register(address, num_bytes)) is not None:
                done = in_words(address - pieces[0][0])
                raise MemoryError(
                    f"{_asked(self.tensor.nbytes)}, but CUDA pinned only the first {done} of them ({error}), and "
                    f"{in_words(free_host_bytes())} more are free; {_ADVICE}"
                )
            self._registered.append(address)
        for address, _ in (pieces[0], pieces[-1]):
            if self._driver.device_pointer(address) != address:
                raise MemoryError(
                    "FreeKV: the GPU sees pinned CPU memory at another address than the CPU, so kernels cannot address "
                    "the host store as one range; FreeKV needs a GPU with unified addressing of registered memory"
                )


def allocate(num_bytes: int) -> torch.Tensor:
    """Return CPU memory that no GPU reads: uint8, ``[num_bytes]``, with undefined contents.

    Raises
    ------
    MemoryError
        If there is not that much. What the system promises and cannot keep, it takes back by ending the process.
    """
    _check_free(num_bytes)
    try:
        return torch.empty(num_bytes, dtype=torch.uint8)
    except RuntimeError as error:  # of torch's allocator
        raise _refused(num_bytes, str(error).splitlines()[0]) from error


_ADVICE = "lower --freekv-host-memory"


def _check_free(num_bytes: int) -> None:
    if num_bytes > (free := free_host_bytes()):
        raise MemoryError(f"{_asked(num_bytes)}, but {in_words(free)} are free; {_ADVICE}")


def _refused(num_bytes: int, why: str) -> MemoryError:
    free = in_words(free_host_bytes())
    return MemoryError(f"{_asked(num_bytes)}, which the system refused ({why}), though {free} look free; {_ADVICE}")


def _asked(num_bytes: int) -> str:
    return f"FreeKV: the host store takes {in_words(num_bytes)} of CPU memory"


def _split(address: int, num_bytes: int, parts: int) -> Iterator[tuple[int, int]]:
    """Cut a run of memory into page-aligned parts."""
    pages = -(-num_bytes // mmap.PAGESIZE)
    share = -(-pages // parts) * mmap.PAGESIZE
    for offset in range(0, num_bytes, share):
        yield address + offset, min(share, num_bytes - offset)


def _touch(part: tuple[int, int]) -> None:
    """Back a page-aligned run of memory with pages. Neither way holds Python's lock."""
    address, num_bytes = part
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _MADV_POPULATE_WRITE) == 0:
        return
    if (code := ctypes.get_errno()) != errno.EINVAL:  # EINVAL: a kernel that does not know it
        raise OSError(code, os.strerror(code))
    ctypes.memset(address, 0, num_bytes)
