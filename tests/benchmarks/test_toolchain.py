"""Compilers find CUDA where nvcc is a wrapper, where a driver has no library to link with, and where headers lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import toolchain
from benchmarks.gpu.toolchain import compiler_environment


def make(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o755)


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    folder = tmp_path / "cuda"
    make(folder / "bin/nvcc", folder / "lib64/libcudart.so", folder / "include/curand_kernel.h")
    return folder


def test_a_wrapper_on_the_path_is_no_toolkit(tmp_path, toolkit):
    make(tmp_path / "wrappers/bin/nvcc")
    given = {"PATH": str(tmp_path / "wrappers/bin")}
    assert compiler_environment(tmp_path / "caches", given, [toolkit], [])["CUDA_HOME"] == str(toolkit)


def test_the_toolkit_that_is_named_and_whole_stays(tmp_path, toolkit):
    other = tmp_path / "other"
    make(other / "bin/nvcc", other / "lib64/libcudart.so", other / "include/curand_kernel.h")
    given = {"CUDA_HOME": str(other), "PATH": str(toolkit / "bin")}
    assert compiler_environment(tmp_path / "caches", given, [toolkit], []) == {"CUDA_HOME": str(other)}


def test_where_there_is_no_toolkit_nothing_is_said(tmp_path):
    assert compiler_environment(tmp_path / "caches", {"PATH": ""}, [tmp_path], []) == {}


def test_headers_of_curand_alone_are_linked(tmp_path, toolkit, monkeypatch):
    (toolkit / "include/curand_kernel.h").unlink()
    package = tmp_path / "nvidia"
    make(package / "cu13/include/curand_kernel.h", package / "cu13/include/cuda_runtime.h")
    spec = type("Spec", (), {"submodule_search_locations": [str(package)]})
    monkeypatch.setattr(toolchain, "find_spec", lambda name: spec)
    found = compiler_environment(tmp_path / "caches", {"CPATH": "given", "PATH": ""}, [toolkit], [])
    folder, given = found["CPATH"].split(":")
    assert given == "given" and [file.name for file in Path(folder).iterdir()] == ["curand_kernel.h"]


def test_a_driver_without_a_library_to_link_with_gets_one(tmp_path):
    make(tmp_path / "driver/libcuda.so.1")
    given = {"PATH": "", "LIBRARY_PATH": "given"}
    for _ in range(2):  # a second run finds the links of the first
        found = compiler_environment(tmp_path / "caches", given, [], [tmp_path / "driver"])
    folder = tmp_path / "caches/lib"
    assert found == {"LIBRARY_PATH": f"{folder}:given", "FLASHINFER_EXTRA_LDFLAGS": f"-L{folder}"}
    assert (folder / "libcuda.so").resolve() == tmp_path / "driver/libcuda.so.1"
    make(tmp_path / "driver/libcuda.so")
    assert compiler_environment(tmp_path / "caches", given, [], [tmp_path / "driver"]) == {}
