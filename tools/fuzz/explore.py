"""Running the machine: rounds of examples, each from a seed that repeats it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from sglang.srt.runtime_context import get_context

from tools.fuzz.machine import MemoryMachine
from tools.fuzz.setups import BASELINE_SETUPS, SETUPS, Setup

EXAMPLES = 10  # of a round
RULES = 80  # of an example, at most
_SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=RULES,
    deadline=None,
    database=None,
    derandomize=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


@contextmanager
def serving_context() -> Iterator[None]:
    """What SGLang's functions ask of the server that they believe to run in."""
    loggers = [
        logging.getLogger(name) for name in ("sglang_freekv", "sglang")
    ]  # a plan of the memory for every example
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    gc.freeze()  # SGLang's modules are a million objects, which every collection would visit
    try:
        with get_context().override_server_args(attention_backend="torch_native"):
            yield
    finally:
        gc.unfreeze()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def run_round(seed: int, setups: tuple[Setup, ...] = SETUPS, shrinks: bool = True) -> int:
    """Run the examples of a seed, and return how many steps they took; a failure is shrunk and printed.

    Raises what a check raised, with a note of how to repeat it.
    """
    machine = type("MemoryMachine", (MemoryMachine,), {"setups": setups})
    phases = _SETTINGS.phases if shrinks else [Phase.generate]
    before = MemoryMachine.steps.total()
    try:
        run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=settings(_SETTINGS, phases=phases))
    except Exception as error:
        which = " --baselines" if setups is BASELINE_SETUPS else ""
        error.add_note(f"Repeat it with: python -m tools.fuzz --seed {seed} --rounds 1{which}")
        raise
    return MemoryMachine.steps.total() - before
