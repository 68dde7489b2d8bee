"""A failed audit is told to everyone who watches the server before it ends; nothing else is."""

from __future__ import annotations

import signal

import pytest

from sglang_freekv.algorithm.audit import AuditError
from sglang_freekv.memory.counters import Counters
from sglang_freekv.serving import health
from sglang_freekv.serving.health import audited


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list:
    """What is told, in order: the metrics, the signal to the main process, the evidence, the seconds waited."""
    events: list = []

    class MainProcess:
        def send_signal(self, number: signal.Signals) -> None:
            events.append(number)

    class Scheduler:
        def parent(self) -> MainProcess:
            return MainProcess()

    monkeypatch.setattr(health, "publish_last_words", events.append)
    monkeypatch.setattr(health.psutil, "Process", Scheduler)
    monkeypatch.setattr(health.time, "sleep", events.append)
    return events


def test_an_audit_that_passes_is_counted_and_not_told(told: list):
    counters = Counters(1, "cpu")
    for _ in range(3):
        with audited(counters, told.append):
            pass
    assert (counters.audited_batches, counters.audit_failures, told) == (3, 0, [])


def test_an_audit_that_fails_is_told_and_ends_the_server_after_a_while(told: list, caplog: pytest.LogCaptureFixture):
    counters, error = Counters(1, "cpu"), AuditError("layer 0: block 1 differs")
    with pytest.raises(AuditError) as raised, audited(counters, told.append):
        raise error
    assert raised.value is error
    metrics = {"audited_batches": 1, "audit_failures": 1}
    assert told == [metrics, signal.SIGTERM, error, health.GRACE_S]
    assert metrics.items() <= counters.as_dict().items()
    (record,) = caplog.records
    assert record.levelname == "CRITICAL" and "\n" not in record.message
    assert "audit failed: layer 0: block 1 differs." in record.message and "/health answers 503" in record.message


def test_another_error_in_the_audit_is_not_taken_for_its_finding(told: list):
    counters = Counters(1, "cpu")
    with pytest.raises(IndexError), audited(counters, told.append):
        raise IndexError
    assert (counters.audit_failures, told) == (0, [])
