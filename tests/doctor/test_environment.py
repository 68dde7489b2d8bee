"""What the doctor says of a machine: here, whether FlashInfer could compile on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_freekv.doctor import environment

FILES = ("bin/nvcc", "lib64/libcudart.so", "include/curand_kernel.h")


def make_toolkit(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch(mode=0o755)
    return folder


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_a_complete_toolkit_is_named_and_nothing_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path, *FILES)))
    line = environment.describe_toolkit()
    assert str(tmp_path) in line and "lacks" not in line


@pytest.mark.parametrize("absent", FILES)
def test_what_a_toolkit_lacks_is_named_with_what_to_do(absent, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_PATH", str(make_toolkit(tmp_path, *(file for file in FILES if file != absent))))
    line = environment.describe_toolkit()
    assert "lacks" in line and "CUDA_HOME" in line
    assert [file for file in FILES if file in line] == [absent]


def test_a_compiler_that_is_a_script_elsewhere_brings_no_toolkit(tmp_path, monkeypatch):
    wrapper = make_toolkit(tmp_path / "wrapper", "bin/nvcc")
    make_toolkit(tmp_path / "toolkit", *FILES)
    monkeypatch.setenv("PATH", str(wrapper / "bin"))
    line = environment.describe_toolkit()
    assert f"{wrapper}, which FlashInfer would take, lacks lib64/libcudart.so" in line


def test_the_folder_is_the_one_that_flashinfer_chooses(tmp_path, monkeypatch):
    cpp_ext = pytest.importorskip("flashinfer.jit.cpp_ext")
    wrapper = make_toolkit(tmp_path / "wrapper", "bin/nvcc")
    monkeypatch.setenv("PATH", f"{wrapper / 'bin'}:/usr/bin:/bin")
    assert environment._toolkit_folder() == Path(cpp_ext.get_cuda_path.__wrapped__())
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    assert environment._toolkit_folder() == Path(cpp_ext.get_cuda_path.__wrapped__())
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert environment._toolkit_folder() == Path(cpp_ext.get_cuda_path.__wrapped__())


def test_compiled_kernels_need_no_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    versions = {"flashinfer-jit-cache": "0.6.15"}
    monkeypatch.setattr(environment, "version", versions.__getitem__)
    assert environment.describe_toolkit() == "FlashInfer's kernels are compiled already (flashinfer-jit-cache 0.6.15)"
