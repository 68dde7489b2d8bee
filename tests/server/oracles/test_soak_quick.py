"""A minute of soak, audited; two with the start of its server. `make soak` is the long one, `tools/soak` what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.oracles import faults
from tools.servers import serve
from tools.soak.process_memory import LIMIT_MIB_PER_HOUR, NOISE_MIB, ProcessMemory
from tools.soak.references import make_references
from tools.soak.settings import BUDGETS, FLAGS, HASTE, STRICT
from tools.soak.soak import soak
from tools.soak.traffic import BURST, MIXED

_SECONDS, _SEED = 60, 1


def test_a_server_keeps_working_and_one_that_stores_wrong_values_is_noticed(small_model: Path, tmp_path: Path):
    references = make_references(small_model, BUDGETS[-1], _SEED)
    fault, broken = faults.environment(tmp_path / "plugin")
    flags, env = (*FLAGS, "--freekv-audit"), STRICT | HASTE | broken
    with serve(small_model, tmp_path / "log", *flags, env=env, anew=True) as server:  # haste is read at import
        summary = soak(server, references, _SECONDS, _SEED, print)
        fault.write_text(faults.STORE)
        with pytest.raises(AssertionError, match="instead of"):
            soak(server, references, seconds=0, seed=_SEED + 1)
    print(summary)
    assert set(summary.requests) == {*MIXED, *BURST}
    assert summary.compared == summary.requests["exact"] > 0
    assert min(summary.ended[how] for how in ("abort", "hung_up", "left", "refused")) > 0, summary
    assert min(summary.retractions, summary.cached_tokens, summary.flushes) > 0, summary
    # What was to be strained was strained.
    assert min(summary.state[name] for name in ("flagged_rows", "misses", "tree_evicted_tokens")) > 0, summary


def grown(slope_mib_per_hour: float, hours: float) -> ProcessMemory:
    """100 samples of memory that grows evenly, after a start that does not count."""
    seconds = [hours * 3600 * i / 100 for i in range(100)]
    return ProcessMemory(seconds, [500 * (i < 50) + slope_mib_per_hour * s / 3600 for i, s in enumerate(seconds)])


@pytest.mark.parametrize(("slope", "hours", "is_stable"), [(0, 1, True), (2, 1, False), (2, 0.1, True), (-5, 1, True)])
def test_memory_that_grows_is_told_from_noise(slope: float, hours: float, is_stable: bool):
    """`slope` is in units of the limit; a short time shows nothing unless it is steep."""
    memory = grown(slope * LIMIT_MIB_PER_HOUR, hours)
    assert memory.slope_mib_per_hour() == pytest.approx(slope * LIMIT_MIB_PER_HOUR)
    assert memory.is_stable() == is_stable
    assert not grown(4 * NOISE_MIB / 0.1, 0.1).is_stable()
