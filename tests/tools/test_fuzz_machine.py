"""Ten thousand steps of the machine, in arbitrary order, with every check after each of them."""

from __future__ import annotations

from tools.fuzz.explore import run_round, serving_context
from tools.fuzz.machine import MemoryMachine
from tools.fuzz.setups import BASELINE_SETUPS

NUM_STEPS = 10_000
MAX_ROUNDS = 100


def test_every_invariant_holds_after_every_step() -> None:
    done = 0
    with serving_context():
        for seed in range(MAX_ROUNDS):  # hypothesis prints what fails, and how to repeat it
            done += run_round(seed)
            if done >= NUM_STEPS:
                break
    print(f"{done:,} steps in rounds 0 to {seed}: {dict(MemoryMachine.steps)}, {dict(MemoryMachine.seen)}")
    assert done >= NUM_STEPS
    steps, seen = MemoryMachine.steps, MemoryMachine.seen
    seen["kept_rows"] = seen["rows"] - seen["flagged_rows"]
    happened = {name: steps[name] for name in ("extend", "finish", "abort", "retract", "evict", "flush")}
    happened |= {name: seen[name] for name in ("misses", "flagged_rows", "kept_rows", "hit_tokens", "exchanges")}
    assert min(happened.values()) > 0, happened


def test_every_invariant_holds_with_the_selectors_that_are_compared_with() -> None:
    before = MemoryMachine.steps.copy()
    with serving_context():
        done = sum(run_round(seed, BASELINE_SETUPS) for seed in range(2))
    steps = MemoryMachine.steps - before
    print(f"{done:,} steps: {dict(steps)}")
    assert min(steps[name] for name in ("extend", "decode", "finish", "abort", "retract", "evict")) > 0, dict(steps)
