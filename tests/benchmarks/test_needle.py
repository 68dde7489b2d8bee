"""The model that the benchmarks load is the one that is committed."""

from __future__ import annotations

from benchmarks.accuracy import matrix
from benchmarks.needle import MODEL
from benchmarks.programs import parse_args


def test_every_benchmark_finds_the_committed_checkpoint(monkeypatch):
    monkeypatch.setattr("sys.argv", ["programs"])
    assert (MODEL / "model.safetensors").is_file()
    assert matrix.parse_args([]).model == parse_args().model == MODEL
