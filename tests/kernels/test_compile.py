"""Every kernel compiles for the GPUs that are supported, as the engine calls it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

import freekv_kernels
from benchmarks.cost_model import launches
from sglang_freekv.config import FreeKVConfig

# The tests compile for the GPUs on which most kernels use the most registers; for all: `make compile-kernels`.
CAPABILITIES = [80, 90, 100] if "FREEKV_ALL_GPUS" in os.environ else [90]
TARGETS = [*(("llama-3.1-8b", capability) for capability in CAPABILITIES), ("odd", 90)]
MAX_SHARED_BYTES = 163 << 10  # of one program, on the GPU that has least: 80; on the others 227 KiB
COMPILER = ".".join(triton.__version__.split(".")[:2])
# Warp instructions of scoring a page and head by codes. What 3.8 has more is the unpacking of codes: its compiler masks
# them byte by byte, with half as many logic instructions again and a third more permutes of bytes.
MAX_SCORE_INSTRUCTIONS = {"3.6": 450, "3.8": 530}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What was compiled, by a process of its own, where kernels are not defined for the interpreter."""
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    script = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), *map(str, CAPABILITIES)]
    done = subprocess.run(script, env=os.environ | paths, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("op", freekv_kernels.Ops._fields)
@pytest.mark.parametrize("shape, capability", TARGETS)
def test_an_op_compiles_without_spilling_registers(kernels, op, shape, capability):
    wanted = {"op": op, "shape": shape, "capability": capability}
    compiled = [kernel for kernel in kernels if wanted.items() <= kernel.items()]
    assert compiled
    for kernel in compiled:
        assert kernel["cubin_bytes"] > 0
        assert kernel["spill_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= MAX_SHARED_BYTES, kernel


def test_nothing_is_compiled_again_when_batch_sizes_and_lengths_change(kernels):
    assert not [kernel for kernel in kernels if kernel["in_service"]]


def test_no_kernel_of_the_package_is_left_out(kernels):
    sources = Path(freekv_kernels.__file__).parent.glob("*_triton.py")
    defined = {name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source.read_text(), re.M)}
    assert defined
    assert defined == {kernel["kernel"] for kernel in kernels}


def test_a_kernel_that_comes_while_the_one_before_runs_waits_before_it_reads_or_writes(kernels):
    dependent = [kernel for kernel in kernels if kernel["is_dependent"]]
    assert all(kernel["waits_first"] for kernel in dependent)
    wanted = {
        (name, shape, capability)
        for name in ("_correct_windows_kernel", "_fetch_blocks_kernel")
        for shape, capability in TARGETS
        if capability >= 90
    }
    assert {(kernel["kernel"], kernel["shape"], kernel["capability"]) for kernel in dependent} == wanted
    fetches = [kernel["constants"]["HALF"] for kernel in dependent if kernel["kernel"] == "_fetch_blocks_kernel"]
    assert {*fetches} == {int(freekv_kernels.Half.FRONT)}  # what follows a fork follows more than a kernel


def test_scoring_by_codes_is_bound_by_memory_and_not_by_instructions(kernels):
    """A page and head of 128 elements in 2 bits is 1,280 bytes. At 4 warp instructions per clock, 450 of them take 74 %
    of the time that an H200 takes to read those, and 530 take 87 %; decoding the keys one by one took 1,626, and 958
    wavefronts of shared memory.
    """
    wanted = {"kernel": "_score_codes_kernel", "shape": "llama-3.1-8b", "capability": 90}
    compiled = [kernel for kernel in kernels if wanted.items() <= kernel.items()]
    assert compiled
    for kernel in compiled:
        per_page = kernel["warps"] / kernel["constants"]["BLOCK_P"]
        assert 0 < kernel["loop_instructions"] * per_page <= MAX_SCORE_INSTRUCTIONS[COMPILER], kernel
        assert 0 < kernel["loop_wavefronts"] * per_page <= 64, kernel


@pytest.mark.skipif(
    launches.COMPILER != COMPILER, reason=f"the cost model counts what Triton {launches.COMPILER} compiles"
)
@pytest.mark.parametrize("capability", sorted(launches.SCORE_INSTRUCTIONS.keys() & set(CAPABILITIES)))
def test_the_cost_model_counts_what_is_compiled(kernels, capability):
    """A hundredth more or less is another version of the compiler; more is another kernel, and wants another count."""

    def of(kernel: str) -> list[dict[str, Any]]:
        wanted = {"kernel": kernel, "shape": "llama-3.1-8b", "capability": capability}
        return [compiled for compiled in kernels if wanted.items() <= compiled.items()]

    scoring = [k["loop_instructions"] * k["warps"] / k["constants"]["BLOCK_P"] for k in of("_score_codes_kernel")]
    assert any(found == pytest.approx(launches.SCORE_INSTRUCTIONS[capability], rel=0.01) for found in scoring), scoring
    default = [
        kernel
        for kernel in of("_correct_windows_kernel")
        if kernel["constants"]["MAX_INTERVAL"] == FreeKVConfig().score_interval
    ]
    (correcting,) = {(k["instructions"], k["inner_instructions"], k["warps"]) for k in default}
    assert correcting == pytest.approx(launches.CORRECT[capability][:3], rel=0.01)
    assert {k["registers"] for k in default} == {launches.CORRECT[capability].registers}
    assert {k["constants"]["BLOCK"] for k in default} == {launches.BLOCK_COLUMNS}


def test_the_cost_model_counts_the_kernels_of_each_op(kernels):
    counted = {*launches.GATE.front, *launches.COSINE.front, "list_candidates"}
    for op in sorted(counted - {"score_pages"}):  # which has one for bounds and one for codes
        names = {kernel["kernel"] for kernel in kernels if kernel["op"] == op}
        assert len(names) == launches.KERNELS.get(op, 1), op
