"""The table of flags in the documents is what the doctor counts."""

from __future__ import annotations

import json

import benchmarks.which_flags.__main__ as which_flags
from benchmarks.cost_model.model import MODELS

GPU_8GB = ["--gpu-memory-gb", "8", "--host-memory-gb", "32", "--mem-fraction-static"]


def test_the_table_is_up_to_date():
    assert which_flags.PATH.read_text() == which_flags.render(), "run python -m benchmarks.which_flags --write"


def test_every_row_that_starts_holds_its_requests_and_recommends_what_holds_more():
    found = {case: which_flags.benefit(case) for case in which_flags.CASES}
    starting = {case: benefit for case, benefit in found.items() if not isinstance(benefit, str)}
    assert {case.gpu_gib for case in starting} == {8, 24, 80}
    for case, benefit in starting.items():
        is_advised = which_flags.row(case)[-1].startswith("`")
        assert is_advised == (benefit.asked.best.num_requests > benefit.asked.plain)
        assert benefit.asked.planned <= benefit.asked.best.num_requests


def test_where_the_default_store_leaves_no_room_a_smaller_one_is_proposed(tmp_path, diagnose):
    config = json.loads((MODELS / "smollm2-1.7b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--model-path", str(tmp_path), *GPU_8GB, "0.7"]
    status, report = diagnose(*flags)
    assert status == 1
    proposal = "With --freekv-host-memory 1.52 it starts, and holds 1 request(s) of 8,192 tokens."
    assert proposal in report.partition("\nResult\n")[2]
    status, report = diagnose(*flags, "--freekv-host-memory", "1.52")
    assert status == 0
    assert "and 1 such requests" in report
