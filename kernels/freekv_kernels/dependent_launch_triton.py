"""Dependent launches: a kernel comes to the GPU while the one before it on its stream still runs, and waits there.

What a launch costs is hidden then. Kernels that are launched so wait before they read or write anything, in every
program, so that a kernel that is done says that all before it are. CUDA has it from compute capability 9.0 on.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, current_target

USES_DEPENDENT_LAUNCHES = True


def dependent_launch() -> dict[str, bool]:
    """Options of the launch of a kernel that starts with `wait_for_the_kernel_before`."""
    target = current_target()
    has_them = target is not None and target.backend == "cuda" and target.arch >= 90
    return {"launch_pdl": True} if has_them and USES_DEPENDENT_LAUNCHES else {}


@triton.jit
def wait_for_the_kernel_before():
    """Wait until all of it is done, and see what it has written. Does nothing where the launch was not dependent."""
    if cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_the_next_kernel_come():
    """When all programs have said so, one that is launched dependently may take what room there is, and wait."""
    if cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_launch_dependents()
