"""The model that the benchmarks load is the one that is committed."""

from __future__ import annotations

from benchmarks.accuracy.__main__ import parse_args as parse_accuracy
from benchmarks.needle import MODEL
from benchmarks.programs.__main__ import parse_args as parse_programs


def test_every_benchmark_finds_the_committed_checkpoint(monkeypatch):
    monkeypatch.setattr("sys.argv", ["programs"])
    assert (MODEL / "model.safetensors").is_file()
    assert parse_accuracy([]).model == parse_programs().model == MODEL
