"""The machine finds every fault that is planted, and says what is wrong."""

from __future__ import annotations

import re

import pytest

from tools.fuzz.written_for import obstacle

if found := obstacle():
    pytest.skip(found, allow_module_level=True)

from tools.fuzz import faults_of_pages, faults_of_windows
from tools.fuzz.explore import run_round, serving_context
from tools.fuzz.planting import Fault
from tools.fuzz.setups import SETUPS, Setup

FIRST_SEED, MAX_ROUNDS = 12, 10  # any seed would do: here the rarest faults show in the first round


def run_until_found(setups: tuple[Setup, ...]) -> Exception:
    with serving_context(), pytest.raises(Exception) as found:
        for seed in range(FIRST_SEED, FIRST_SEED + MAX_ROUNDS):
            run_round(seed, setups, shrinks=False)
    return found.value


@pytest.mark.parametrize("fault", faults_of_pages.FAULTS + faults_of_windows.FAULTS, ids=str)
def test_a_planted_fault_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    setups = tuple(setup for setup in SETUPS if setup.name == fault.setup)
    fault.plant(monkeypatch)
    error = run_until_found(setups)
    assert re.search(fault.found_by, str(error)), repr(error)


def test_a_seed_repeats_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    faults_of_pages.a_release_forgets_a_page.plant(monkeypatch)
    first, second = (run_until_found(SETUPS) for _ in range(2))
    assert (str(first), first.__notes__) == (str(second), second.__notes__)
