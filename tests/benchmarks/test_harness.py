"""The accuracy harness: every method meets the same sessions, results are kept, tables are right."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import pictures, report, results
from benchmarks.accuracy.client import COUNTERS, Generation, collect, play
from benchmarks.accuracy.matrix import Matrix, draw_batches
from benchmarks.accuracy.settings import Layout, Setting, settings
from benchmarks.accuracy.tasks.session import Session, Turn
from benchmarks.methods import METHODS, Method, parse_method
from benchmarks.records import RecordWriter, read_records
from benchmarks.server import Chunk
from benchmarks.tables.marked import fill
from sglang_freekv.flags import add_cli_args, take_options
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.request_params import request_budget_tokens

GEOMETRY = Geometry(num_layers=3, num_qo_heads=8, num_kv_heads=2, head_dim=64, dtype=torch.float32)
BUDGETS = (512, 1024)
SIZES = (*(Layout(page_size=size, sink=64, recent=64) for size in (16, 32, 64)), Layout(pooling="mean"))


@dataclass(frozen=True)
class Recite:
    """Each turn asks for a number that stands in the session's document; `turns` of them."""

    name: str = "recite"
    group: str = "lookup"
    turns: int = 1

    def sessions(self, seed: int, count: int, context: int) -> list[Session]:
        found = []
        for i in range(count):
            rng = random.Random(f"{self.name} {seed} {i}")
            values = [rng.randrange(1000) for _ in range(self.turns)]
            document = [rng.randrange(1000) for _ in range(context)]
            prompts = [[*document, values[0]], *([value] for value in values[1:])]
            turns = [
                Turn(prompt, 2, lambda outputs, n=n, v=value: [float(outputs[n] == [v, v])])
                for n, (prompt, value) in enumerate(zip(prompts, values, strict=True))
            ]
            found.append(Session(tuple(turns), context))
        return found


@dataclass
class FakeClient:
    """Answers a prompt with its last token, twice; or with what is no answer where `is_right` says so."""

    is_right: bool = True
    has_counters: bool = True
    asked: list[tuple[list[int], int | None, str | None]] = field(default_factory=list)
    generated: int = 0

    def generate(
        self, prompts: list[list[int]], turns: Sequence[Turn], budget: int | None, cache: str | None
    ) -> Generation:
        pairs = list(zip(prompts, turns, strict=True))
        self.asked += [(list(prompt), turn.max_new_tokens, budget, cache) for prompt, turn in pairs]
        outputs = [[prompt[-1] if self.is_right else -1] * turn.max_new_tokens for prompt, turn in pairs]
        self.generated += sum(map(len, outputs))
        return Generation(outputs, decoded=len(prompts), seconds=0.5 * len(prompts))

    def counters(self) -> dict[str, int] | None:
        return (
            dict.fromkeys(COUNTERS, 0)
            | {"rows": 10 * self.generated, "flagged_rows": 4 * self.generated}
            | {"recalled_bytes": 2048 * self.generated}
            | {"device_token_steps": 5 * self.generated, "host_token_steps": 20 * self.generated}
            if self.has_counters
            else None
        )


@dataclass
class FakeServers:
    """Starts a client for each setting; of the methods in `wrong` the answers are."""

    wrong: tuple[str, ...] = ()
    started: dict[str, FakeClient] = field(default_factory=dict)

    @contextmanager
    def start(self, setting: Setting) -> Iterator[FakeClient]:
        method = setting.method
        yield self.started.setdefault(setting.name, FakeClient(method.name not in self.wrong, not method.is_full))


def matrix(file: Path, servers: FakeServers) -> Matrix:
    return Matrix(file, servers.start, lambda setting: "digest")


def batches(turns: int = 1, count: int = 6) -> list:
    return draw_batches([Recite(turns=turns)], [16], count, seed=1, size=4)


def two_methods() -> list[Setting]:
    return settings([METHODS["full"], METHODS["exact"]], [Layout()], BUDGETS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sessions.jsonl"


class TestMethods:
    @pytest.mark.parametrize("layout", SIZES, ids=str)
    @pytest.mark.parametrize("method", [m for m in METHODS.values() if not m.is_full], ids=lambda m: m.name)
    def test_flags_are_what_the_engine_accepts(self, method: Method, layout: Layout):
        for setting in settings([method], [layout], BUDGETS):
            flags = setting.flags(GEOMETRY, concurrency=4)
            parser = argparse.ArgumentParser()
            parser.add_argument("--page-size", type=int)
            add_cli_args(parser)
            config, _ = take_options(vars(parser.parse_args(flags)))
            for budget in setting.budgets:
                assert request_budget_tokens(config, {"freekv_budget": budget}) == budget

    def test_full_attention_has_no_flags_of_ours_and_one_server(self):
        (setting,) = settings([METHODS["full"]], SIZES, BUDGETS)
        assert not any("freekv" in flag for flag in setting.flags(GEOMETRY, 4))
        assert setting.budgets == (None,)

    def test_a_window_has_one_server_for_all_budgets_and_poolings(self):
        (setting,) = settings([METHODS["window"]], [Layout(), Layout(pooling="mean", key_bits=4)], BUDGETS)
        assert (setting.budgets, setting.layout) == (BUDGETS, Layout())
        flags = setting.flags(GEOMETRY, 4)
        assert flags[flags.index("--freekv-selector") + 1] == "streaming-llm"

    def test_rivals_differ_from_each_other_by_their_flags_alone(self):
        rivals = [method for method in METHODS.values() if method.is_rival]
        assert {"quest", "one-time", "r-kv", "corm", "arkvale", "freekv-paper"} == {m.name for m in rivals}
        assert len({(method.flags, method.is_full) for method in METHODS.values()}) == len(METHODS)

    def test_a_new_method_is_a_name_and_flags(self):
        method = parse_method("late=--freekv-tau 0.5 --freekv-new 3")
        (setting,) = settings([method], [Layout()], BUDGETS)
        assert setting.flags(GEOMETRY, 4)[-4:] == ["--freekv-tau", "0.5", "--freekv-new", "3"]
        with pytest.raises(ValueError, match="unknown method 'late'"):
            parse_method("late")

    def test_a_budget_without_room_for_a_page_is_refused(self):
        with pytest.raises(ValueError, match=r"budget 256 .* at least 288 tokens"):
            settings([METHODS["exact"]], [Layout()], [256, 512])

    def test_settings_have_names_of_their_own(self):
        names = [setting.name for setting in settings(list(METHODS.values()), SIZES, BUDGETS)]
        assert len(set(names)) == len(names)


class TestPlaying:
    def test_a_turn_is_asked_with_all_that_came_before(self):
        client = FakeClient()
        (session,) = Recite(turns=3).sessions(1, 1, 16)
        played = play(client, [session], budget=512)
        text: list[int] = []
        for turn, output, (prompt, *_) in zip(session.turns, played.outputs[0], client.asked, strict=True):
            text += turn.prompt
            assert prompt == text
            text += output
        assert played.generated == 6

    def test_sessions_of_different_length_are_played_side_by_side(self):
        one, three = (Recite(turns=turns).sessions(1, 1, 16)[0] for turns in (1, 3))
        played = play(FakeClient(), [one, three], budget=None)
        assert [len(outputs) for outputs in played.outputs] == [1, 3]

    def test_decoding_is_timed_from_the_last_first_token(self):
        chunks = [
            Chunk(*values)
            for values in [
                (1.0, 0, 1, [5]),
                (2.0, 0, 2, [6]),
                (4.0, 1, 1, [7]),
                (5.0, 1, 3, [8, 9]),
                (6.0, 0, 3, [4]),
            ]
        ]
        assert collect(chunks, 2) == Generation([[5, 6, 4], [7, 8, 9]], decoded=3, seconds=2.0)

    def test_a_request_without_tokens_is_an_error(self):
        with pytest.raises(RuntimeError, match=r"requests \[1\]"):
            collect([Chunk(1.0, 0, 1, [5])], 2)


class TestMatrix:
    @pytest.mark.parametrize("turns", [1, 3])
    def test_right_answers_score_1_and_wrong_ones_0(self, file: Path, turns: int):
        found = matrix(file, FakeServers(wrong=("exact",))).run(two_methods(), batches(turns))
        scores = {(c.params["method"], c.params.get("budget")): c.score.value for c in results.summarize(found)}
        assert scores == {("full", None): 1.0, ("exact", 512): 0.0, ("exact", 1024): 0.0}

    @pytest.mark.parametrize("turns", [1, 3])
    def test_every_method_and_budget_meets_the_same_sessions(self, file: Path, turns: int):
        servers = FakeServers()
        matrix(file, servers).run(settings(list(METHODS.values()), [Layout()], BUDGETS), batches(turns))
        asked = [
            [prompt for prompt, tokens, b, _ in client.asked if b == budget and tokens == 2]
            for client in servers.started.values()
            for budget in (None, *BUDGETS)
        ]
        full, *others = [prompts for prompts in asked if prompts]
        assert len(others) == 2 * (len(METHODS) - 1)
        assert all(prompts == full for prompts in others)

    def test_documents_are_read_before_they_are_played_and_once_for_all_budgets(self, file: Path):
        servers = FakeServers()
        matrix(file, servers).run(two_methods(), batches(count=4))
        full, exact = servers.started.values()
        assert [tokens for _, tokens, *_ in full.asked] == [2] * 4
        assert [tokens for _, tokens, *_ in exact.asked] == [1] * 4 + [2] * 8
        assert {cache for *_, cache in exact.asked} == {None}

    def test_turns_never_see_what_another_budget_has_decoded(self, file: Path):
        servers = FakeServers()
        matrix(file, servers).run(two_methods(), batches(turns=2))
        _, exact = servers.started.values()
        caches = {(budget, cache) for *_, budget, cache in exact.asked}
        assert caches == {(512, "512"), (1024, "1024")}

    def test_counters_are_of_decoding_only(self, file: Path):
        cells = results.summarize(matrix(file, FakeServers()).run(two_methods(), batches()))
        full, *retrieval = cells
        assert (full.recalled_per_token, full.flagged_share) == (None, None)
        assert all(cell.recalled_per_token == 2048 and cell.flagged_share == 0.4 for cell in retrieval)
        assert all(cell.tokens_per_second == 2.0 for cell in cells)

    def test_full_attention_holds_everything_on_the_device_and_methods_what_the_engine_counts(self, file: Path):
        full, *retrieval = results.summarize(matrix(file, FakeServers()).run(two_methods(), batches()))
        assert full.footprint is None
        assert all(cell.footprint == (0.25, 1) for cell in retrieval)

    @pytest.mark.parametrize("servers", [1, 2])
    def test_a_run_that_was_interrupted_goes_on(self, file: Path, servers: int):
        whole = matrix(file.with_name("whole.jsonl"), FakeServers()).run(two_methods(), batches())
        first, calls = FakeServers(), []

        def ends_in_the_middle(*args) -> None:
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            append(*args)

        append = results.append
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(results, "append", ends_in_the_middle)
            matrix(file, first).run(two_methods(), batches(), servers)
        kept = len(file.read_text().splitlines())
        assert 2 <= kept < len(whole)
        file.write_text(file.read_text() + '{"cell": {"ta')  # the line that was being written

        second = FakeServers()
        assert matrix(file, second).run(two_methods(), batches(), servers) == whole
        assert len(file.read_text().splitlines()) == len(whole) == len(results.read(file))
        played = sum(tokens == 2 for client in second.started.values() for _, tokens, *_ in client.asked)
        assert played == 6 * 3 - sum(len(result.scores) for result in list(results.read(file).values())[:kept])

    def test_nothing_is_started_for_what_is_there(self, file: Path):
        first, second = FakeServers(), FakeServers()
        whole = matrix(file, first).run(two_methods(), batches())
        assert matrix(file, second).run(two_methods(), batches()) == whole
        assert second.started == {}

    def test_other_sessions_or_another_server_are_measured_again(self, file: Path):
        matrix(file, FakeServers()).run(two_methods(), batches(count=4))
        servers = FakeServers()
        other = draw_batches([Recite()], [16], 4, seed=2, size=4)
        matrix(file, servers).run(two_methods(), other)
        assert len(servers.started) == 2
        Matrix(file, servers.start, lambda setting: "other").run(two_methods(), other)
        assert len(results.read(file)) == 9

    def test_a_server_that_fails_ends_the_run(self, file: Path):
        @contextmanager
        def start(setting: Setting) -> Iterator[FakeClient]:
            raise RuntimeError("no memory")
            yield

        with pytest.raises(RuntimeError, match="no memory"):
            Matrix(file, start, str).run(two_methods(), batches())


@pytest.fixture(scope="module")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records") / "made_up.jsonl"


@pytest.fixture(scope="module")
def records(records_file: Path) -> list:
    rng = random.Random(0)
    methods = [METHODS[name] for name in ("full", "window", "exact", "freekv-0.9")]
    chosen = settings(methods, [Layout(), Layout(pooling="mean")], BUDGETS)
    tasks = [Recite(), Recite("walk", "walk"), Recite("talk", "session", turns=3)]
    found = matrix(records_file.with_name("sessions"), FakeServers()).run(
        chosen, draw_batches(tasks, [16, 32], 8, 1, 4)
    )
    for result in found:
        if result.cell["method"] != "full":
            result.scores[:] = [[[float(rng.random() < 0.7)] for _ in session] for session in result.scores]
    return results.write_records(results.summarize(found), RecordWriter("made_up", records_file))


class TestReport:
    def test_records_are_read_back(self, records: list, records_file: Path):
        assert read_records(records_file) == records

    def test_a_task_has_a_line_for_each_method_and_budget(self, records: list):
        lines = report.table(records, "recite").markdown().splitlines()
        assert "| context | method | pooling | budget | score [95 %] |" in lines[0]
        at_16 = [line for line in lines if line.startswith("| 16 |")]
        assert len(at_16) == 1 + 2 + 4 + 4  # full, window, exact and freekv with two poolings
        assert at_16[0].startswith("| 16 | full |  |  | 1.000 [0.676, 1.000] |  |")
        assert lines[0].endswith("| recalled KiB/token | flagged | KV footprint device / host | tokens/s |")
        assert "| 2.0 | 0.40 | 0.25 / 1.00 | 2 |" in at_16[1]
        assert "|  |  | 1.00 / 0.00 | 2 |" in at_16[0]
        assert "made_up" in report.table(records, "recite").conditions[0]

    def test_the_summary_has_a_column_for_each_group(self, records: list):
        lines = report.table(records, "summary").markdown().splitlines()
        assert lines[0].endswith("| budget | flagged | KV footprint device / host | lookup | walk | session |")
        assert "1.000 | 1.000 | 1.000 |" in lines[2]
        assert "%)" in lines[3]

    def test_turns_have_columns(self, records: list):
        lines = report.table(records, "turns").markdown().splitlines()
        assert lines[0].endswith("| turn 1 | turn 2 | turn 3 |")
        assert all(line.startswith("| talk |") for line in lines[2:])
        assert "| full |  |  | 1.000 | 1.000 | 1.000 |" in lines[2]

    def test_a_marked_file_is_filled_and_the_rest_stays(self, records: list, records_file: Path):
        text = "a\n<!-- accuracy made_up summary -->\nold\n<!-- end -->\nb\n<!-- accuracy none walk -->\n<!-- end -->\n"
        filled = fill(text, {"accuracy": report.table}, records_file.parent)
        assert filled.startswith("a\n")
        assert "old" not in filled
        assert report.table(records, "summary").markdown() in filled
        assert "No records yet." in filled
        assert fill(filled, {"accuracy": report.table}, records_file.parent) == filled

    def test_a_report_has_all_tables(self, records: list):
        text = report.render(records)
        assert all(f"## {title}\n" in text for title in ("By task group", "recite", "walk", "talk", "By turn"))

    def test_scores_are_drawn_against_the_share_of_rows_that_was_flagged(self, records: list, tmp_path: Path):
        names = {"full": "full", "window": "codes, tau -1", "exact": "codes, tau 0.2", "freekv-0.9": "min-max, tau 0.2"}
        renamed = [replace(r, params={**r.params, "method": names[r.params["method"]]}) for r in records]
        drawn = pictures.draw_flagged(renamed, tmp_path / "flagged.svg").read_text()
        lines = ("codes", "min-max", "full attention", "flagged share of rows")
        assert [f"<!-- {text} -->" in drawn for text in lines] == [True] * len(lines)
        assert "tau" not in drawn  # a line for each selector, whatever its points are

    def test_pictures_are_the_same_each_time(self, records: list, tmp_path: Path):
        first, second = (pictures.draw(records, tmp_path / name) for name in ("first", "second"))
        assert [path.name for path in first] == ["budget.svg", "recalled.svg"]
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
        assert b"<svg" in first[0].read_bytes()
