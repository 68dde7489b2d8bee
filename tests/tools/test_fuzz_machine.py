"""Ten thousand steps of the machine, in arbitrary order, with every check after each of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.documents import ROOT
from tools.fuzz.written_for import obstacle

if found := obstacle():
    pytest.skip(found, allow_module_level=True)

from tools.fuzz.explore import run_round, serving_context
from tools.fuzz.machine import MemoryMachine

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


def test_the_command_runs_a_round_with_the_selectors_that_are_compared_with() -> None:
    command = [sys.executable, "-m", "tools.fuzz", "--baselines", "--rounds", "1", "--workers", "1", "--seed", "0"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    last = run.stdout.splitlines()[-1]
    print(last)
    assert run.returncode == 0 and last.endswith(" steps in 1 rounds, 0 failures"), run.stdout + run.stderr
