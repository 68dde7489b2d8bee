"""The throughput suite without servers: files that bench_serving reads, numbers, order of runs, goals and tables."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from benchmarks.records import RESULTS, Record, RecordWriter, read_records
from benchmarks.throughput import __main__ as suite
from benchmarks.throughput import run as runs
from benchmarks.throughput.datasets import write_dataset
from benchmarks.throughput.goals import goals_of
from benchmarks.throughput.measure import Answer, Measurement, Number, decode_throughput, equal_outputs, log_numbers
from benchmarks.throughput.pictures import draw
from benchmarks.throughput.report import brief, table
from benchmarks.throughput.setups import FREEKV, PLAIN, Common, Setup, ablations
from benchmarks.throughput.words import in_words
from benchmarks.throughput.workloads import ABLATION, FULL, MEMORY, QUICK, SERIES, TRAFFIC, Workload
from sglang_freekv.flags import add_cli_args, take_options
from sglang_freekv.testing.tiny_model import TinyModel

RANDOM = Workload("random", 12, (16, 256), (4, 32), concurrency=4)
PREFIX = Workload("prefix", 5, (16, 32), (4, 8), prefix=200)
TURNS = Workload("turns", 3, (24, 24), (8, 8), turns=4)
LOG = """\
[2026-11-21 15:36:57] Prefill batch, #new-seq: 2, #new-token: 96, #cached-token: 32, token usage: 0.00, \
#running-req: 3, #queue-req: 0, #pending-token: 0, cpu graph: False, input throughput (token/s): 806.55
[2026-11-21 15:36:58] Decode batch, #running-req: 4, #token: 1056, token usage: 0.03, freekv: 288 blocks used, \
0.0 MiB recalled, hit rate 1.000, flagged -, 0 demand misses, 0 absent, cpu graph: False, #queue-req: 0
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    TinyModel(layers=1).write(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


def read_with_bench_serving(flags: list[str], tokenizer) -> list:
    """Rows as SGLang's client reads them."""
    from sglang.benchmark.datasets import DATASET_MAPPING

    values = dict(zip(flags[::2], flags[1::2], strict=True))
    args = SimpleNamespace(
        dataset_path=values["--dataset-path"],
        num_prompts=int(values["--num-prompts"]),
        sharegpt_output_len=int(values["--sharegpt-output-len"]) if "--sharegpt-output-len" in values else None,
        sharegpt_context_len=None,
        prompt_suffix="",
        apply_chat_template=False,
        dataset_offset=0,
        agentic_max_turns=None,
    )
    return DATASET_MAPPING[values["--dataset-name"]].from_args(args).load(tokenizer)


def test_bench_serving_reads_the_lengths_that_were_asked_for(tokenizer, tmp_path):
    rows = read_with_bench_serving(write_dataset(RANDOM, tokenizer, tmp_path).flags, tokenizer)
    assert len(rows) == RANDOM.requests
    assert all(16 <= row.prompt_len <= 256 and 4 <= row.output_len <= 32 for row in rows)
    assert len({row.prompt_len for row in rows}) > RANDOM.requests // 2
    assert all(row.prompt_len + row.output_len <= RANDOM.longest for row in rows)


def test_questions_share_a_prefix_that_another_question_has_brought_into_the_cache(tokenizer, tmp_path):
    dataset = write_dataset(PREFIX, tokenizer, tmp_path)
    prompts = [row.prompt for row in read_with_bench_serving(dataset.flags, tokenizer)]
    (warm,) = [row.prompt for row in read_with_bench_serving(dataset.warm_flags, tokenizer)]
    assert len(prompts) == PREFIX.requests
    assert {prompt[:200] for prompt in prompts} == {warm[:200]}
    assert len({prompt[200:216] for prompt in [*prompts, warm]}) == PREFIX.requests + 1


def test_conversations_have_their_turns(tokenizer, tmp_path):
    rows = read_with_bench_serving(write_dataset(TURNS, tokenizer, tmp_path).flags, tokenizer)
    assert [len(row.prompt) for row in rows] == [4, 4, 4]
    assert all(len(turn[0]["content"]) == 24 for row in rows for turn in row.prompt)
    assert all(row.output_len == 8 and row.prompt_len == TURNS.longest for row in rows)


def test_equal_workloads_give_equal_files(tokenizer, tmp_path):
    for folder in ("one", "other"):
        write_dataset(PREFIX, tokenizer, tmp_path / folder)
    files = [sorted((tmp_path / folder).iterdir()) for folder in ("one", "other")]
    assert files[0] and [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_a_missing_file_of_the_user_is_refused(tokenizer, tmp_path):
    text = Workload("text", 4, (1, 1), (8, 8), dataset=("sharegpt", tmp_path / "chats.json"))
    with pytest.raises(FileNotFoundError, match=r"--dataset-path .*chats\.json does not exist"):
        write_dataset(text, tokenizer, tmp_path)


def test_decoding_alone_counts_from_the_last_first_token_to_the_first_end():
    # From 1 s to 2 s; the third token of the first request, and the second of the other.
    assert decode_throughput([0.5, 1.0], [[0.25, 0.75, 0.5], [1.0, 1.0]]) == pytest.approx(3.0)
    assert decode_throughput([0.5, 5.0], [[0.25, 0.25], [1.0]]) is None


def test_the_servers_log_tells_prefix_hits_and_concurrency():
    numbers = log_numbers(LOG)
    assert numbers["prefix_hit_rate"].value == 0.25
    assert numbers["peak_concurrency"].value == 5
    assert log_numbers("")["peak_concurrency"].value == 0


def test_only_answers_within_the_budget_are_compared():
    plain = [Answer("a", 100), Answer("b", 100), Answer("c", 101), Answer("d", None)]
    ours = [Answer("a", 100), Answer("x", 100), Answer("x", 101), Answer("x", None)]
    assert equal_outputs(ours, plain, budget=100) == 0.5
    assert equal_outputs(ours, plain, budget=99) is None


def common(model: Path, dtype: str = "bfloat16") -> Common:
    return Common(model, dtype, tokens=65536, requests=8, chunk=65536)


class FakeServer:
    """Notes what runs; its device memory is 51,200 bytes."""

    started: list[FakeServer]

    def __init__(self, name: str, flags: list[str], log: Path) -> None:
        self.name, self.flags, self.is_frozen = name, flags, False
        self.started.append(self)

    def freekv(self) -> dict | None:
        sizes = ("device_blocks", "block_table", "page_summaries", "windows", "prefill_arena", "workspace")
        counts = {f"{name}_bytes": 0 for name in sizes} | {"host_tokens": 1, "full_kv_bytes_per_token": 8}
        return None if self.name == PLAIN else counts | {"device_blocks_bytes": 51200, "device_bytes_per_request": 1}

    def freeze(self) -> None:
        self.is_frozen = True

    def thawed(self):
        return self

    def __enter__(self) -> None:
        self.is_frozen = False

    def __exit__(self, *_) -> None:
        self.is_frozen = True

    def stop(self) -> None:
        self.is_frozen = True


@pytest.fixture
def bench(monkeypatch, tmp_path, tokenizer):
    """A run whose servers are not started, and whose throughputs are given: plain SGLang's, then FreeKV's."""
    started: list[FakeServer] = []
    speeds = {PLAIN: iter([10.0, 20.0, 10.0]), FREEKV: iter([20.0, 20.0, 30.0])}
    order: list[str] = []

    def measure(server, *_):
        assert [s.name for s in started if not s.is_frozen] == [server.name]
        order.append(server.name)
        return Measurement({"output_throughput": Number(next(speeds[server.name]), "tokens/s")}, [Answer("a", 3)])

    monkeypatch.setattr(FakeServer, "started", started, raising=False)
    monkeypatch.setattr(runs, "Server", FakeServer)
    monkeypatch.setattr(runs, "measure", measure)
    monkeypatch.setattr(runs, "write_dataset", lambda *_: None)
    writer = RecordWriter("throughput", tmp_path / "throughput.jsonl", commit="c", environment={})
    run = runs.Run(tmp_path, tokenizer, [], writer)
    return SimpleNamespace(run=run, started=started, order=order)


@pytest.mark.parametrize("is_side_by_side", [True, False])
def test_servers_take_turns_and_ratios_are_medians_of_rounds(bench, model, is_side_by_side):
    rounds = Workload("short", 2, (4, 8), (2, 2), rounds=3)
    setups = [Setup(PLAIN, ()), Setup(FREEKV, (), budget=64)]
    bench.run.run([runs.Phase(TRAFFIC, common(model), setups, (rounds,), is_side_by_side)])
    assert bench.order == ([PLAIN, FREEKV] * 3 if is_side_by_side else [PLAIN] * 3 + [FREEKV] * 3)
    speed, equal = read_records(bench.run.writer.path)
    assert (speed.metric, speed.value, speed.baseline_value, speed.ratio) == ("output_throughput", 20, 10, 2)
    assert (equal.metric, equal.value) == ("equal_outputs", 1)
    assert speed.params["setup"] == FREEKV and speed.params["budget"] == 64


@pytest.mark.parametrize("one_by_one", [True, False])
def test_in_the_memory_phase_plain_sglang_gets_as_many_device_bytes(bench, model, one_by_one):
    flags = ["--phases", MEMORY, "--quick", *["--one-by-one"] * one_by_one]
    args = suite.parse_args([*flags])
    args.model = model
    bench.run.run(suite.phases(args, QUICK))
    plain = next(server for server in bench.started if server.name == PLAIN)
    assert plain.flags[-2:] == ["--max-total-tokens", "100"]  # 51,200 bytes, 512 for a token
    assert bench.order == [FREEKV, PLAIN]


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_servers_get_the_same_flags_and_freekv_accepts_its_own(model, sizes):
    args = suite.parse_args(["--ablations", "--server-flags", "--tp 1", "--", "--freekv-sink", "64"])
    args.model = model
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    parser.add_argument("--page-size", type=int)
    for phase in suite.phases(args, sizes):
        plain = next(setup for setup in phase.setups if setup.name == PLAIN)
        for setup in phase.setups:
            assert setup.flags[: len(plain.flags)] == plain.flags
            options, _ = parser.parse_known_args(setup.flags)
            config, _ = take_options(vars(options))
            assert (config is None) == (setup.name == PLAIN)
            assert config is None or (config.sink_tokens, config.budget_tokens) == (64, setup.budget)
        tokens = int(plain.flags[plain.flags.index("--max-total-tokens") + 1])
        assert tokens >= max(workload.longest for workload in phase.workloads)


def test_a_burst_does_not_fit_and_short_requests_are_within_the_budget():
    for sizes in (FULL, QUICK):
        traffic = {workload.name: workload for workload in sizes.workloads[TRAFFIC]}
        assert traffic["burst"].requests * traffic["burst"].prompt[0] > sizes.tokens
        assert traffic["short"].prompt[1] + traffic["short"].output[1] <= sizes.budget


def test_blocks_hold_the_windows_of_all_running_requests(model):
    shared, tokens = common(model), {}
    for name, settings in ablations(1024).items():
        flags = settings.setup(name, shared).flags
        gib = float(flags[flags.index("--freekv-device-blocks-memory") + 1])
        tokens[name] = gib * (1 << 30) / shared.token_bytes
    assert tokens[FREEKV] == pytest.approx(8 * 2 * 1024 + 32, abs=1)
    assert tokens["blocks for 4 windows"] == pytest.approx(8 * 4 * 1024 + 32, abs=1)
    assert tokens["blocks for everything"] == pytest.approx(65536 + 32, abs=1)


def test_token_bytes_are_those_of_keys_and_values(model):
    assert common(model, dtype="float32").token_bytes == 2 * 1 * 2 * 64 * 4
    assert common(model, dtype="auto").token_bytes == 2 * 1 * 2 * 64 * 2  # the checkpoint's: bfloat16


def record(metric: str, value: float, plain: float | None, unit: str, **params) -> Record:
    params = {"phase": TRAFFIC, "workload": "short", "setup": FREEKV, "requests": 8, "context": 64, **params}
    ratio = value / plain if plain else None
    baseline = None if plain is None else PLAIN
    environment = {"gpu": None, "cpu": "cpu", "cores": 2, "torch": "2", "sglang": "0.5"}
    return Record("throughput", params, metric, value, unit, baseline, plain, ratio, "c", environment, "run", "now")


def test_goals_are_reached_missed_or_not_measured():
    fast = {"phase": SERIES, "workload": "context", "context": 32768}
    prefix = {"workload": "prefix", "prefix": 16384}
    goals = goals_of(
        [
            record("decode_throughput", 35.0, 10.0, "tokens/s", **fast),
            record("output_throughput", 95.0, 100.0, "tokens/s"),
            record("ttft_p50", 1.3, 1.0, "ms", **prefix),
            record("peak_concurrency", 16, 4, "requests", phase=MEMORY, workload="memory", context=4096),
        ]
    )
    assert [goal.verdict for goal in goals] == ["MISSED", "met", "MISSED", "not measured", "not measured"]


def test_losses_stand_beside_wins_in_the_table():
    text = table(
        [
            record("output_throughput", 50.0, 100.0, "tokens/s"),
            record("ttft_p50", 5.0, 10.0, "ms"),
            record("ttft_p95", 50.0, 20.0, "ms"),
        ],
        TRAFFIC,
    ).markdown()
    plain, ours, ratio = [[cell.strip() for cell in line.split("|")[3:-1]] for line in text.splitlines()[2:5]]
    assert plain == [PLAIN, "100", "10 / 20"]
    assert ours == [FREEKV, "50", "5 / 50"]
    assert ratio == ["ratio", "0.50 **loss**", "0.50"]
    assert "†" not in text, "of one round, a ratio is the quotient"
    assert table([], TRAFFIC).markdown() == "No records yet.\n"


def test_a_ratio_of_rounds_that_is_not_the_quotient_above_it_is_marked_and_explained():
    rounds = dataclasses.replace(record("output_throughput", 7.56, 8.45, "tokens/s"), ratio=0.91)
    assert "| 0.91† **loss** |" in table([rounds], TRAFFIC).markdown()
    assert "0.91† loss" in brief([rounds], TRAFFIC).text()
    assert "†: the servers took turns for several rounds, and the ratio is" in in_words([rounds])


def test_a_terminal_shows_a_run_in_lines_of_120_characters_and_says_what_it_means():
    text = suite.report(read_records(RESULTS / "throughput.jsonl"), [TRAFFIC, SERIES, MEMORY, ABLATION])
    assert max(map(len, text.splitlines())) <= 120
    said = " ".join(text.split())
    lists = r"Throughput is better in: (.*?)\. Worse in: (.*?)\. Decoding alone is better in: (.*?)\. Worse in: (.*?)\."
    found = re.search(lists, said).groups()
    throughput, decoding = found[:2], found[2:]
    assert "context, 8 x 32,768" in throughput[0] and "short, 64 x 512" in throughput[1]
    assert "context, 8 x 32,768" in decoding[0] and "concurrency, 1 x 8,192" in decoding[1]
    assert "16 requests at once, not 3" in said
    assert "nothing about a GPU" in text


def test_requests_that_did_not_finish_are_said():
    lost = [record("output_throughput", 0.0, 0.0, "tokens/s"), record("finished", 0.25, 1.0, "ratio")]
    assert "only 25% of the requests finished" in in_words(lost)
    assert "better in" not in in_words(lost), "nothing is known of their speed"


def test_the_quick_suite_has_requests_that_recall_and_save_memory(model):
    args = suite.parse_args(["--quick", "--phases", SERIES])
    args.model = model
    (series,) = suite.phases(args, QUICK)
    (documents,) = (w for w in series.workloads if w.name == "documents")
    blocks = series.common.requests * 2 * QUICK.budget  # tokens, of all running requests' windows
    assert QUICK.budget < documents.context
    assert documents.at_once * documents.context > 4 * blocks
    assert series.common.tokens >= documents.all_tokens, "all of them run at once"


def test_pictures_are_drawn_of_what_was_measured(tmp_path):
    points = [
        record("decode_throughput", 40.0 + n, 10.0, "tokens/s", phase=SERIES, workload="context", context=n)
        for n in (1024, 2048)
    ]
    (path,) = draw(points, tmp_path)
    assert path.name == "throughput_context.png" and path.read_bytes().startswith(b"\x89PNG")


def test_the_users_text_is_the_only_workload(tmp_path):
    args = suite.parse_args(["--dataset-path", str(tmp_path / "mine.jsonl"), "--output-len", "7"])
    (text,) = suite.suite_of(args).workloads[TRAFFIC]
    assert text.dataset == ("custom", tmp_path / "mine.jsonl") and text.output == (7, 7)
