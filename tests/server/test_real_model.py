"""The real-model benchmark as it is run, on a tiny model: plain SGLang and the engine in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.records import read_records
from benchmarks.tables.table import rows_of
from sglang_freekv.testing.tiny_model import TinyModel
from tools.zygote.client import start

_FLAGS = "--contexts 512 --budgets 320 --steps 6 --every 3 --methods whole exact window"
_PROCESSES = 2  # plain SGLang, and the engine


def test_the_whole_context_loses_nothing_and_a_window_something(tmp_path: Path):
    model, book = tmp_path / "model", tmp_path / "book.txt"
    TinyModel(layers=2, dtype="float32").write(model)
    book.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 12)
    where = ["--model", str(model), "--kinds", str(book), "--out", str(tmp_path)]
    arguments = ["-m", "benchmarks.real_model", *where, *_FLAGS.split()]
    log = tmp_path / "log"
    process = start(arguments, log, os.environ | {"OMP_NUM_THREADS": "1"}, _PROCESSES)
    assert process.wait(300) == 0, log.read_text()
    records = [r for r in read_records(tmp_path / "real_model.jsonl") if "layer" not in r.params]
    numbers = {row.params["method"]: row.numbers for row in rows_of(records) if row.params["kind"] == "all"}
    assert numbers["whole"]["kl"].value < 1e-6
    assert numbers["whole"]["kept"].value == 1
    assert numbers["window"]["kl"].value > 1e-5
    assert numbers["window"]["kept"].value < numbers["exact"]["kept"].value <= numbers["exact"]["best"].value <= 1
    assert numbers["exact"]["flagged"].value == 1
    assert numbers["window"]["hidden_bytes"].value == 0 < numbers["exact"]["exposed_bytes"].value
    assert "budget 320" in log.read_text()
