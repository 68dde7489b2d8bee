"""Host memory: pinned piece by piece, released once, bounded by the container, near the GPU."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from sglang_freekv.memory import pinned
from sglang_freekv.memory.pinned import PinnedMemory, allocate, cpus_near, free_container_bytes, free_host_bytes

MIB = 1 << 20


class RecordingDriver:
    """Stands for CUDA: remembers what is pinned, refuses the piece number `fails_at`."""

    def __init__(self, fails_at: int | None = None, shift: int = 0) -> None:
        self.pinned: dict[int, int] = {}
        self.fails_at, self.shift = fails_at, shift
        self.calls = 0

    def register(self, address: int, num_bytes: int) -> str | None:
        if self.calls == self.fails_at:
            return "out of memory"
        self.calls += 1
        assert address not in self.pinned
        self.pinned[address] = num_bytes
        return None

    def unregister(self, address: int) -> str | None:
        return None if self.pinned.pop(address, None) else "not registered"

    def device_pointer(self, address: int) -> int | None:
        inside = any(start <= address < start + size for start, size in self.pinned.items())
        return address + self.shift if inside else None

    def near_cpus(self) -> set[int]:
        return os.sched_getaffinity(0)


def test_a_system_that_would_share_the_memory_with_forked_processes_is_refused_before_anything_is_pinned(monkeypatch):
    driver, unknown = RecordingDriver(), 12345
    monkeypatch.setattr(pinned.mmap, "MADV_DONTFORK", unknown)
    with pytest.raises(MemoryError, match=r"forked .*\(.*Invalid argument\).*MADV_DONTFORK"):
        PinnedMemory(4096, driver)
    assert not driver.calls


@pytest.mark.parametrize("num_bytes", [4096, 8 * MIB, 8 * MIB + 12345])
def test_the_pieces_cover_the_memory_once_and_only_the_last_is_short(num_bytes):
    driver = RecordingDriver()
    memory = PinnedMemory(num_bytes, driver, piece_bytes=3 * MIB)
    assert memory.tensor.shape == (num_bytes,) and memory.tensor.dtype == torch.uint8
    address = memory.tensor.data_ptr()
    for start, size in driver.pinned.items():
        assert start == address and start % os.sysconf("SC_PAGESIZE") == 0
        address += size
    assert address == memory.tensor.data_ptr() + num_bytes
    assert set(list(driver.pinned.values())[:-1]) <= {3 * MIB}


def test_the_memory_is_zero_and_holds_what_is_written_in_any_dtype_and_shape():
    memory = PinnedMemory(2 * MIB, RecordingDriver())
    assert not memory.tensor.any()
    kv = memory.tensor.view(torch.bfloat16).view(64, 2, 32, 256)
    kv[:] = torch.arange(64)[:, None, None, None]
    assert torch.equal(kv[:, 1, 31, 255], torch.arange(64, dtype=torch.bfloat16))


def test_every_page_is_backed_before_it_is_pinned():
    resident = []

    class Driver(RecordingDriver):
        def register(self, address, num_bytes):
            resident.append(psutil.Process().memory_info().rss)
            return super().register(address, num_bytes)

    before = psutil.Process().memory_info().rss
    PinnedMemory(64 * MIB, Driver())
    assert resident[0] - before > 60 * MIB


def test_a_view_keeps_the_memory_after_the_owner_is_gone():
    view = PinnedMemory(MIB, RecordingDriver()).tensor.view(torch.int32)
    view += 7
    assert (view == 7).all()


def test_release_unpins_every_piece_and_repeating_it_does_nothing(caplog):
    driver = RecordingDriver()
    memory = PinnedMemory(8 * MIB, driver, piece_bytes=MIB)
    assert len(driver.pinned) == 8
    memory.unpin()
    assert not driver.pinned
    memory.unpin()
    assert not caplog.records
    assert not memory.tensor.any()  # still memory of the CPU


def test_a_piece_that_cannot_be_unpinned_is_reported_and_the_others_are_unpinned(caplog):
    driver = RecordingDriver()
    memory = PinnedMemory(4 * MIB, driver, piece_bytes=MIB)
    del driver.pinned[memory.tensor.data_ptr() + MIB]
    memory.unpin()
    assert not driver.pinned
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not registered" in caplog.text


@pytest.mark.parametrize("fails_at", [0, 5])
def test_memory_that_cannot_be_pinned_ends_in_a_sentence_with_nothing_pinned(fails_at):
    driver = RecordingDriver(fails_at=fails_at)
    with pytest.raises(
        MemoryError, match=r"takes 8.00 MiB.*pinned only .*out of memory.* free; lower --freekv-host-memory"
    ):
        PinnedMemory(8 * MIB, driver, piece_bytes=MIB)
    assert driver.calls == fails_at and not driver.pinned


def test_memory_that_the_gpu_sees_elsewhere_is_refused_with_nothing_pinned():
    driver = RecordingDriver(shift=MIB)
    with pytest.raises(MemoryError, match="at another address than the CPU"):
        PinnedMemory(2 * MIB, driver, piece_bytes=MIB)
    assert not driver.pinned


def test_more_than_is_free_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(pinned, "free_host_bytes", lambda: MIB)
    with pytest.raises(MemoryError, match=r"takes 1.00 TiB .*but 1.00 MiB are free; lower --freekv-host-memory"):
        PinnedMemory(1 << 40, RecordingDriver())
    with pytest.raises(MemoryError, match=r"takes 1.00 TiB .*but 1.00 MiB are free; lower --freekv-host-memory"):
        allocate(1 << 40)


def test_what_the_system_refuses_to_map_is_a_memory_error(monkeypatch):
    monkeypatch.setattr(pinned, "free_host_bytes", lambda: 1 << 62)
    with pytest.raises(MemoryError, match="the system refused"):
        PinnedMemory(1 << 60, RecordingDriver())


def test_a_kernel_that_cannot_populate_by_advice_gets_its_pages_touched(monkeypatch):
    monkeypatch.setattr(pinned, "_MADV_POPULATE_WRITE", 99999)
    before = psutil.Process().memory_info().rss
    memory = PinnedMemory(32 * MIB, RecordingDriver())
    assert psutil.Process().memory_info().rss - before > 30 * MIB
    assert not memory.tensor.any()


def test_a_system_that_runs_out_while_populating_is_a_memory_error(monkeypatch):
    monkeypatch.setattr(pinned.ctypes, "get_errno", lambda: errno.ENOMEM)
    monkeypatch.setattr(pinned, "_MADV_POPULATE_WRITE", 99999)
    driver = RecordingDriver()
    with pytest.raises(MemoryError, match=r"takes 1.00 MiB .*refused .*Cannot allocate memory.*--freekv-host-memory"):
        PinnedMemory(MIB, driver)
    assert not driver.pinned


def test_a_process_that_may_not_have_so_much_is_told_what_was_asked_what_is_free_and_what_to_lower():
    """The limit is real. The machine has the memory, so that only the system can refuse it."""
    program = """
import resource, sys
from tests.memory.test_pinned import RecordingDriver
from sglang_freekv.memory.pinned import PinnedMemory, allocate

in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (16 << 20),) * 2)
for take in (allocate, lambda num_bytes: PinnedMemory(num_bytes, RecordingDriver())):
    try:
        take(64 << 20)
    except MemoryError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    refusals = done.stdout.splitlines()
    assert len(refusals) == 2, done.stderr
    for refusal in refusals:
        assert re.search(r"takes 64.0 MiB of CPU memory, which the system refused \(.*annot? allocate memory", refusal)
        assert re.search(r"though [\d.]+ [MGT]iB look free; lower --freekv-host-memory$", refusal)


def test_a_full_dev_shm_is_refused_with_a_sentence_before_sglang_is_ended_by_it():
    """In a mount namespace with a /dev/shm of one page, where the system lets us make one."""
    program = """
from sglang_freekv.config import UnsupportedConfiguration
from sglang_freekv.serving.support import check_shared_memory

try:
    check_shared_memory()
except UnsupportedConfiguration as error:
    print(error)
"""
    tiny = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4k none /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*tiny, "true"], capture_output=True).returncode:
        pytest.skip("the system does not allow mounts here")
    run = [sys.executable, "-c", program]
    roomy = subprocess.run(run, capture_output=True, text=True, check=True)
    full = subprocess.run([*tiny, *run], capture_output=True, text=True, check=True)
    assert roomy.stdout == ""
    assert full.stdout.startswith(
        "/dev/shm has 4.00 KiB free, and SGLang's processes share up to 1.00 MiB there; remove"
    )


def test_one_line_says_how_much_was_pinned_and_how_fast(caplog):
    with caplog.at_level(logging.INFO, "sglang_freekv"):
        PinnedMemory(MIB, RecordingDriver())
    assert len(caplog.records) == 1
    assert "host store: 0.0 GiB pinned in" in caplog.text and "populate" in caplog.text and "register" in caplog.text


def test_a_forked_child_does_not_have_the_memory():
    program = """
import os, sys
from tests.memory.test_pinned import RecordingDriver
from sglang_freekv.memory.pinned import PinnedMemory

memory = PinnedMemory(1 << 20, RecordingDriver())
child = os.fork()
if child == 0:
    memory.tensor[0] = 1  # a copy-on-write page would take this
    os._exit(0)
_, status = os.waitpid(child, 0)
sys.exit(0 if os.WIFSIGNALED(status) else 1)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0


def test_the_threads_that_populate_run_near_the_gpu_and_this_one_stays_where_it_was(monkeypatch):
    allowed = os.sched_getaffinity(0)
    near = {min(allowed)}
    seen = []

    class Driver(RecordingDriver):
        def near_cpus(self):
            return near

    touch = pinned._touch
    monkeypatch.setattr(pinned, "_touch", lambda part: (seen.append(os.sched_getaffinity(0)), touch(part)))
    PinnedMemory(4 * MIB, Driver(), piece_bytes=MIB)
    assert len(seen) == 4 and all(cpus == near for cpus in seen)
    assert os.sched_getaffinity(0) == allowed


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def group(folder: str, limit: object, usage: int, inactive: int = 0) -> dict[str, object]:
    return {
        f"sys/fs/cgroup/{folder}memory.max": limit,
        f"sys/fs/cgroup/{folder}memory.current": usage,
        f"sys/fs/cgroup/{folder}memory.stat": f"anon 5\ninactive_file {inactive}",
    }


def test_a_container_bounds_what_is_free_and_its_page_cache_counts_as_free(tmp_path):
    root = write(tmp_path, {"proc/self/cgroup": "0::/", **group("", 100 * MIB, 60 * MIB, inactive=25 * MIB)})
    assert free_container_bytes(root) == 65 * MIB
    assert free_host_bytes(root) == 65 * MIB


def test_the_tightest_of_nested_groups_counts_and_a_group_without_a_limit_does_not(tmp_path):
    files = {"proc/self/cgroup": "0::/a/b/c"}
    files |= group("a/", 50 * MIB, 10 * MIB) | group("a/b/", 90 * MIB, 5 * MIB) | group("a/b/c/", "max", 5 * MIB)
    assert free_container_bytes(write(tmp_path, files)) == 40 * MIB


def test_a_group_over_its_limit_has_nothing_free(tmp_path):
    assert free_container_bytes(write(tmp_path, {"proc/self/cgroup": "0::/", **group("", MIB, 2 * MIB)})) == 0


@pytest.mark.parametrize("folder", ["", "docker/abc/"])
def test_version_1_groups_are_read_also_where_the_path_is_the_hosts(folder, tmp_path):
    mount = f"sys/fs/cgroup/memory/{folder}"
    files = {
        "proc/self/cgroup": "7:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/",
        f"{mount}memory.limit_in_bytes": 100 * MIB,
        f"{mount}memory.usage_in_bytes": 90 * MIB,
        f"{mount}memory.stat": f"inactive_file 1\ntotal_inactive_file {20 * MIB}",
    }
    assert free_container_bytes(write(tmp_path, files)) == 30 * MIB


@pytest.mark.parametrize(
    "files", [{}, {"proc/self/cgroup": "0::/"}, {"proc/self/cgroup": "0::/", **group("", "max", 1)}]
)
def test_without_a_limit_the_machine_is_the_bound(files, tmp_path):
    root = write(tmp_path, files)
    assert free_container_bytes(root) is None
    assert abs(free_host_bytes(root) - psutil.virtual_memory().available) < 1 << 30


PCI = "0000:1b:00.0"


def machine(root: Path, node: object, **cpulists: str) -> Path:
    files = {f"sys/devices/system/node/{name}/cpulist": cpus for name, cpus in cpulists.items()}
    return write(root, {f"sys/bus/pci/devices/{PCI}/numa_node": node, **files})


@pytest.fixture
def cpus_0_to_7(monkeypatch):
    monkeypatch.setattr(pinned.os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.usefixtures("cpus_0_to_7")
def test_the_cpus_of_the_gpus_node_are_near_as_far_as_they_are_allowed(tmp_path):
    assert cpus_near(PCI, machine(tmp_path, 1, node0="0-3,64-67", node1="4,6-7,68-71")) == {4, 6, 7}


@pytest.mark.usefixtures("cpus_0_to_7")
@pytest.mark.parametrize(
    ("node", "cpulists"),
    [
        (0, {"node0": "0-3"}),  # one node: nothing to choose
        (-1, {"node0": "0-3", "node1": "4-7"}),  # the firmware does not say
        (1, {"node0": "0-7", "node1": "8-15"}),  # a container without the node's CPUs
        (2, {"node0": "0-3", "node1": "4-7"}),
    ],
)
def test_otherwise_every_allowed_cpu_is_near(node, cpulists, tmp_path):
    assert cpus_near(PCI, machine(tmp_path, node, **cpulists)) == set(range(8))


@pytest.mark.usefixtures("cpus_0_to_7")
def test_a_device_that_the_system_does_not_list_is_near_every_cpu(tmp_path):
    root = machine(tmp_path, 1, node0="0-3", node1="4-7")
    assert cpus_near("0000:ff:00.0", root) == set(range(8))
