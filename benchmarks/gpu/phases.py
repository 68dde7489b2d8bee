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
    1: ("FlashInfer as well", 8),
    2: ("SGLang as well", 9),
}
# Phases of other stages that a stage runs too: what is in every record, what numbers are held against, what compiles.
_SHARED = {1: ("env", "predict"), 2: ("env", "compile")}
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
    Phase("serve", "serve_check", 2, 120, 60, needs=("compile",)),
    Phase("gpu-tests", "run_tests", 1, 60, 10, "test_gpu", needs=("compile",)),
    Phase("layer", "layer_step", 0, 60, 20, needs=_UNTIMED, has_kernels=True),
    Phase("kernels", "kernels", 0, 45, 15, needs=_UNTIMED, has_kernels=True),
    Phase("link", "link", 0, 30, 10, needs=_UNTIMED, has_kernels=True),
    Phase("stack", "stack_step", 1, 150, 40, needs=("compile",), has_kernels=True),
    Phase("attention", "attention", 1, 40, 15, needs=("compile",), has_kernels=True),
    Phase("decode-plain", "decode_step", 2, 90, 55, "run_plain"),
    Phase("decode-freekv", "decode_step", 2, 150, 90, "run_freekv"),
    Phase("throughput", "serve_throughput", 2, 120, 60),
    Phase("language", "language_check", 2, 100, 40),
    Phase("models", "models_check", 2, 90, 50),
    # Data types and widths of heads that the measured models do not have.
    Phase("compile-tests", "compile", 1, 150, 60, "compile_for_tests"),
    Phase("attention-tests", "run_tests", 1, 60, 10, "test_attention"),
)


def phases_of(stage: int) -> list[str]:
    """Names of what a stage runs, in order."""
    return [phase.name for phase in PHASES if phase.stage == stage or phase.name in _SHARED.get(stage, ())]
