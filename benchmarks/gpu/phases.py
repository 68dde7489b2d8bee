"""The phases in their order: what must be right first, then the numbers, the most wanted ones before the others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """One process. `seconds` is its limit, `least` what it needs to be worth starting."""

    name: str
    module: str  # benchmarks.gpu.<module>
    seconds: float
    least: float
    function: str = "run"
    is_background: bool = False  # on the CPU, beside the phases that follow
    needs: tuple[str, ...] = ()  # background phases that must have ended
    has_kernels: bool = False  # calls them directly: a rehearsal is in Triton's interpreter


# Compilers run beside tests, and have ended before anything is timed.
PHASES = (
    Phase("env", "machine", 30, 5),
    Phase("compile", "compile", 150, 10, "compile_serving", is_background=True),
    Phase("kernel-tests", "run_tests", 75, 30, "test_kernels"),
    Phase("compile-tests", "compile", 110, 10, "compile_for_tests", is_background=True, needs=("compile",)),
    Phase("serve", "serve_check", 120, 60, needs=("compile",)),
    Phase("models", "models_check", 90, 50, needs=("compile",)),
    Phase("gpu-tests", "run_tests", 60, 10, "test_gpu", needs=("compile-tests",)),
    Phase("link", "link", 40, 15, has_kernels=True),
    Phase("decode-plain", "decode_step", 90, 55, "run_plain"),
    Phase("decode-freekv", "decode_step", 150, 90, "run_freekv"),
    Phase("kernels", "kernels", 60, 20, has_kernels=True),
)
