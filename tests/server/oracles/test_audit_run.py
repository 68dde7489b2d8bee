"""The audit stays silent through a randomized run; `audit_run.py` says what it consists of."""

from __future__ import annotations

from pathlib import Path

from server.oracles.audit_run import FLAGS, HASTE, STRICT, run
from servers import serve

_NUM_REQUESTS = 500


def test_the_audit_stays_silent_through_a_randomized_run(small_model: Path, tmp_path: Path) -> None:
    with serve(small_model, tmp_path / "log", *FLAGS, env=STRICT | HASTE) as server:
        report = run(server, _NUM_REQUESTS, seed=1)
    assert report.answered + report.aborted + report.hung_up == _NUM_REQUESTS
    assert min(report.aborted, report.hung_up, report.retracted, report.cached_tokens) > 0, report
    assert min(report.freekv[name] for name in ("flagged_rows", "misses", "tree_evicted_tokens")) > 0, report
