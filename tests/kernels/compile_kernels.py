"""Compile every kernel for GPUs that are not here:  compile_kernels.py CAPABILITY..., prints a JSON line per kernel.

The ops are called with the engine's tensors in CPU memory, and Triton does what it does for a launch, except to launch:
it binds and specialises the arguments, and compiles.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from freekv_kernels import Ops, triton_ops
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.testing.kernel_inputs import KernelInputs

LLAMA_8B = Geometry(num_layers=32, num_qo_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, key_bits=2)
ODD = Geometry(num_layers=2, num_qo_heads=9, num_kv_heads=3, head_dim=96, dtype=torch.float16, page_size=64, key_bits=4)
TARGETS = [
    ("llama-3.1-8b", LLAMA_8B, 80),
    ("llama-3.1-8b", LLAMA_8B, 90),
    ("llama-3.1-8b", LLAMA_8B, 100),
    ("odd", ODD, 90),
]
# The first compiles all, and the others nothing: batch sizes and lengths change in service. 1 and multiples of 16 are
# what Triton would specialise.
SIZES = [
    {"batch_size": 4, "context_tokens": 4096},
    {"batch_size": 1, "context_tokens": 2112},
    {"batch_size": 16, "context_tokens": 2560},
]
COUNTED = ("score_pages", "correct_windows")  # ops whose instructions are counted


class AbsentGPU:
    """As much of a Triton driver as compiling asks for. Kernels are kept by device number, so each has its own."""

    def __init__(self, number: int, capability: int) -> None:
        self._number, self._capability = number, capability

    def get_current_device(self) -> int:
        return self._number

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_without_launch() -> None:
    """From now on, to launch a kernel is to compile it."""
    launch = triton.JITFunction.run
    triton.JITFunction.run = lambda self, *args, warmup, **kwargs: launch(self, *args, warmup=True, **kwargs)


def compile_op(op: str, inputs: KernelInputs) -> list[dict[str, object]]:
    """Call an op in all ways in which the engine calls it; what was compiled, one record per kernel."""
    compiled, log = [], io.StringIO()

    def record(*, src, metadata, metadata_group, **_) -> None:
        cubin, warps = Path(metadata_group[f"{src.name}.cubin"]), metadata["num_warps"]
        constants = {
            src.fn.arg_names[path[0]]: value for path, value in src.constants.items() if isinstance(value, int)
        }
        about = {"kernel": src.name, "shared_bytes": metadata["shared"], "cubin_bytes": cubin.stat().st_size}
        about |= {"warps": warps, "constants": constants, "is_dependent": metadata["launch_pdl"]}
        if metadata["launch_pdl"]:
            about["waits_first"] = waits_first(disassemble(cubin))
        compiled.append(about | (count_instructions(disassemble(cubin)) if op in COUNTED else {}))

    triton.knobs.compilation.listener = record
    with redirect_stdout(log):
        for call in getattr(inputs, op)().values():
            getattr(triton_ops(), op)(*call.args, **call.kwargs)
    # Registers are in no metadata until a device has loaded the kernel: they are read from what ptxas says.
    usage = re.findall(
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", log.getvalue(), re.S
    )
    if len(usage) != len(compiled):
        raise RuntimeError(f"{len(compiled)} kernels and {len(usage)} reports of ptxas in its log:\n{log.getvalue()}")
    for kernel, (stores, loads, registers) in zip(compiled, usage, strict=True):
        kernel |= {"spill_bytes": int(stores) + int(loads), "registers": int(registers)}
    return compiled


def disassemble(cubin: Path) -> dict[int, tuple[str, str]]:
    """Instructions by address: name and operands."""
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    sass = subprocess.run([disassembler, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return {
        int(m[1], 16): (m[2], m[3]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?(\S+)(.*?);", sass)
    }


def waits_first(code: dict[int, tuple[str, str]]) -> bool:
    """Whether a program waits for the kernel before (ACQBULK) ahead of what it does in memory, and of any branch."""
    names = [name.split(".")[0] for name, _ in code.values()]
    own = ("LD", "LDG", "LDGSTS", "ST", "STG", "ATOM", "ATOMG", "RED", "BRA", "EXIT")
    return "ACQBULK" in names and not {*own} & {*names[: names.index("ACQBULK")]}


def count_instructions(code: dict[int, tuple[str, str]]) -> dict[str, int]:
    """Instructions of a warp: in the kernel, in its innermost loops, and in one turn of the longest loop.

    Of the last also wavefronts of shared memory, if no banks conflict.
    """
    jumps = ((re.search(r"0x([0-9a-f]+)", target), at) for at, (name, target) in code.items() if name == "BRA")
    loops = [(int(found[1], 16), at) for found, at in jumps if found and int(found[1], 16) < at]
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    names = [name for at, (name, _) in code.items() if begin <= at <= end]
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    inner = sum(a <= at <= b for at in code for a, b in innermost)
    counts = {"instructions": len(code), "inner_instructions": inner, "loop_instructions": len(names)}
    return counts | {"loop_wavefronts": sum(map(wavefronts, names))}


def wavefronts(instruction: str) -> int:
    """Of shared memory, at least: it gives a warp 128 bytes at a time."""
    name, *modifiers = instruction.split(".")
    if name in ("LDSM", "STSM"):
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    if name not in ("LDS", "STS", "LDGSTS"):
        return 0
    return 4 if "128" in modifiers else 2 if "64" in modifiers else 1


def main(capabilities: set[int]) -> None:
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # ptxas does not speak when a kernel comes from the cache
    compile_without_launch()
    targets = [target for target in TARGETS if target[2] in capabilities]
    for number, (shape, geometry, capability) in enumerate(targets):
        config = FreeKVConfig(page_size=geometry.page_size, key_bits=geometry.key_bits)
        first, *others = (
            KernelInputs(geometry, **sizes, config=config, max_context=131072, device="cpu") for sizes in SIZES
        )
        triton.runtime.driver.set_active(AbsentGPU(number, capability))
        for op in Ops._fields:
            about = {"op": op, "shape": shape, "capability": capability}
            for kernel in compile_op(op, first):
                print(json.dumps(about | kernel | {"in_service": False}))
            for kernel in (kernel for inputs in others for kernel in compile_op(op, inputs)):
                print(json.dumps(about | kernel | {"in_service": True}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main({int(argument) for argument in sys.argv[1:]})
