"""The dump of a request tells what its windows are, and is bounded in every way."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from freekv_kernels import Count, PairList
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.serving import debug_dump
from sglang_freekv.serving.debug_dump import DebugDump
from tests.support.releases import of_release
from tests.support.simulated_requests import PAGE, SimulatedEngine
from tests.support.small_engine import two_requests

GEOMETRY = Geometry(3, 4, 2, 16, torch.float32)


@pytest.fixture
def engine(tmp_path: Path) -> SimulatedEngine:
    """Five steps into decoding; its last layer is dense."""
    config = FreeKVConfig(
        budget_tokens=4 * PAGE,
        sink_tokens=PAGE,
        recent_tokens=PAGE,
        tau=0.5,
        dense_layers=(2,),
        debug_dump=str(tmp_path),
    )
    return two_requests(GEOMETRY, config)


@pytest.fixture
def dump(engine: SimulatedEngine, tmp_path: Path) -> DebugDump:
    return DebugDump(tmp_path, engine.memory, rank=0)


def asking(row: int, every: object = True, rid: str = "a") -> SimpleNamespace:
    """A request as SGLang's scheduler has it."""
    params = SimpleNamespace(custom_params={"freekv_dump": every})
    return of_release.request(row, rid=rid, sampling_params=params, origin_input_ids=[1] * 9)


def step(engine: SimulatedEngine, dump: DebugDump, *reqs: SimpleNamespace) -> None:
    """A decode step of the engine's requests, of which `reqs` may ask for dumps."""
    dump.begin_batch(reqs)
    engine.decode()
    plan = engine.decoder.last_plan
    dump.end_batch(plan.batch, plan.flags)


def read(folder: Path) -> list[list[dict]]:
    """The lines of each file, in the order of the files."""
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.iterdir())]


def test_a_line_is_what_the_step_attended_to(engine: SimulatedEngine, dump: DebugDump, tmp_path: Path):
    request = engine.requests[0]
    step(engine, dump, asking(request.row))
    ((header, line),) = read(tmp_path)
    assert header["config"]["budget_tokens"] == 4 * PAGE and header["num_prompt_tokens"] == 9
    assert (line["event"], line["num_tokens"], line["budget_pages"]) == ("decode", request.length, [4, 4])
    pages = [page for first, count in line["host_page_runs"] for page in range(first, first + count)]
    assert pages == request.pages
    assert line["not_full"] == [[len(pages) - 1, (request.length - 1) % PAGE + 1]]
    for number, layer in enumerate(line["layers"][:2]):
        assert layer["front"] == engine.front(number)[request.row].tolist()
        assert layer["back"] == engine.back(number)[request.row].tolist()
        assert layer["front_absent"] == [[], []]
    assert line["layers"][2] == {"layer": 2, "dense": True}


def test_lines_tell_which_heads_were_corrected(engine: SimulatedEngine, dump: DebugDump, tmp_path: Path):
    before = engine.memory.counters[Count.FLAGGED_ROWS]
    for _ in range(8):
        step(engine, dump, asking(engine.requests[0].row))
    # The other request is within its budget: all corrections are this one's.
    ((_, *lines),) = read(tmp_path)
    told = [is_corrected for line in lines for layer in line["layers"][:2] for is_corrected in layer["corrected"]]
    assert sum(told) == engine.memory.counters[Count.FLAGGED_ROWS] - before
    assert 0 < sum(told) < len(told)


def test_the_flags_of_a_layer_outlive_the_next_layer(engine: SimulatedEngine):
    first, second, _ = engine.memory.tables.flags(2)
    assert first.is_flagged.data_ptr() != second.is_flagged.data_ptr()
    without = SimulatedEngine(GEOMETRY, FreeKVConfig(budget_tokens=4 * PAGE, sink_tokens=PAGE, recent_tokens=PAGE))
    first, second, _ = without.memory.tables.flags(2)
    assert first.is_flagged.data_ptr() == second.is_flagged.data_ptr(), "without dumps it costs no memory"


def test_a_window_entry_without_a_block_is_told(engine: SimulatedEngine, dump: DebugDump, tmp_path: Path):
    request = engine.requests[0]
    dump.begin_batch([asking(request.row)])
    engine.decode()
    lost, head = engine.front(0)[request.row, 1, 1].item(), 1
    key = request.pages[lost] * GEOMETRY.num_kv_heads + head
    engine.memory.blocks.forget(PairList(torch.tensor([key]), torch.tensor([1], dtype=torch.int32)))
    plan = engine.decoder.last_plan
    dump.end_batch(plan.batch, plan.flags)
    layers = read(tmp_path)[0][1]["layers"]
    assert layers[0]["front_absent"] == [[], [lost]]
    for layer in layers[:2]:
        assert layer["back_absent"] == [[], [lost] if lost in layer["back"][head] else []]


def test_only_the_requests_that_ask_are_written_and_as_often_as_they_ask(
    engine: SimulatedEngine, dump: DebugDump, tmp_path: Path
):
    first, second = engine.requests
    for _ in range(5):
        step(engine, dump, asking(first.row, every=2), asking(second.row, every=False, rid="b"))
    ((_, *lines),) = read(tmp_path)
    assert [line["row"] for line in lines] == [first.row] * 3
    assert [line["num_tokens"] for line in lines] == [first.length - 4, first.length - 2, first.length]


def test_a_prompt_is_written_when_it_is_complete(engine: SimulatedEngine, dump: DebugDump, tmp_path: Path):
    engine.leave(engine.requests[1])
    trace = engine.requests[0].trace
    request = engine.start(trace, 6 * PAGE)
    for num_tokens in (PAGE, 5 * PAGE):
        dump.begin_batch([asking(request.row)])
        engine.prefill([(request, num_tokens)])
        dump.end_batch(engine.prefiller.last_plan.completed)
    ((_, line),) = read(tmp_path)
    assert (line["event"], line["num_tokens"], line["num_pages"]) == ("prompt", 6 * PAGE, 6)
    assert "corrected" not in line["layers"][0]


def test_a_full_file_says_so_and_grows_no_more(
    engine: SimulatedEngine, dump: DebugDump, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(debug_dump, "MAX_FILE_BYTES", 3000)
    for _ in range(6):
        step(engine, dump, asking(engine.requests[0].row))
    ((*_, last),) = read(tmp_path)
    assert last == {"event": "full", "max_file_bytes": 3000}
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 3100


def test_there_are_only_so_many_files(
    engine: SimulatedEngine, dump: DebugDump, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setattr(debug_dump, "MAX_FILES", 2)
    for i in range(4):
        step(engine, dump, asking(engine.requests[0].row, rid=f"request {i}"))
    assert len(read(tmp_path)) == 2
    assert "that was the last of 2 files" in caplog.text


@pytest.mark.parametrize("rid", ["../../etc/passwd", "/root/x", "a" * 5000, "ä\0\n", ""])
def test_the_name_of_a_request_cannot_lead_out_of_the_folder(
    engine: SimulatedEngine, dump: DebugDump, tmp_path: Path, rid: str
):
    step(engine, dump, asking(engine.requests[0].row, rid=rid))
    ((header, _),) = read(tmp_path)
    assert header["request"] == rid


def test_a_failed_audit_leaves_every_request_of_the_batch(engine: SimulatedEngine, dump: DebugDump, tmp_path: Path):
    plan = engine.decoder.last_plan
    path = dump.write_failure(RuntimeError("a block differs"), plan.batch, plan.flags)
    ((header, *lines),) = read(tmp_path)
    assert path.parent == tmp_path and "audit-failure" in path.name
    assert header["error"] == "a block differs"
    assert [line["row"] for line in lines] == [request.row for request in engine.requests]
