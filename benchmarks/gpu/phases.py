"""The phases in their order: what must be right first, then the numbers, the most wanted ones before the others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """One process. `seconds` is its limit, `least` what it needs to be worth starting."""

    name: str
    module: str  # benchmarks.gpu.<module>
    stage: int
    seconds: float
    least: float
    function: str = "run"
    is_background: bool = False  # beside the phases that follow
    needs: tuple[str, ...] = ()  # background phases that must have ended
    has_kernels: bool = False  # calls them directly: a rehearsal is in Triton's interpreter


# What a machine has on which the phases of a stage run, and the minutes that they take.
STAGES = {
    0: ("torch, Triton and pytest", 4),
    1: ("FlashInfer as well", 5),
    2: ("SGLang as well", 9),
}
FOR_ALL_STAGES = ("env", "predict")  # what is in every record, and what numbers are held against
_UNTIMED = ("claim-stress", "fetch-stress", "host-order", "sanitize", "op-checks")
# What is right or wrong, and what compiles, runs side by side, and has ended before anything is timed.
PHASES = (
    Phase("env", "machine", 0, 20, 5),
    Phase("predict", "predict", 0, 20, 5),
    Phase("claim-stress", "claim_stress", 0, 75, 10, is_background=True, has_kernels=True),
    Phase("fetch-stress", "fetch_stress", 0, 75, 10, is_background=True, has_kernels=True),
    Phase("host-order", "host_order", 0, 75, 10, is_background=True, has_kernels=True),
    Phase("sanitize", "sanitize", 0, 75, 20, is_background=True),
    Phase("op-checks", "kernels", 0, 75, 20, "check", is_background=True, has_kernels=True),
    Phase("compile", "compile", 1, 150, 10, "compile_serving", is_background=True),
    Phase("kernel-tests", "run_tests", 0, 75, 30, "test_kernels"),
    Phase("compile-tests", "compile", 1, 110, 10, "compile_for_tests", is_background=True, needs=("compile",)),
    Phase("serve", "serve_check", 2, 120, 60, needs=("compile",)),
    Phase("models", "models_check", 2, 90, 50, needs=("compile",)),
    Phase("gpu-tests", "run_tests", 1, 60, 10, "test_gpu", needs=("compile-tests",)),
    Phase("layer", "layer_step", 0, 60, 20, needs=_UNTIMED, has_kernels=True),
    Phase("kernels", "kernels", 0, 45, 15, needs=_UNTIMED, has_kernels=True),
    Phase("link", "link", 0, 30, 10, needs=_UNTIMED, has_kernels=True),
    Phase("stack", "stack_step", 1, 150, 30, needs=("compile", "compile-tests"), has_kernels=True),
    Phase("attention", "attention", 1, 40, 15, needs=("compile",), has_kernels=True),
    Phase("decode-plain", "decode_step", 2, 90, 55, "run_plain"),
    Phase("decode-freekv", "decode_step", 2, 150, 90, "run_freekv"),
)
