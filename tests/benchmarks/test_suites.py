"""Suites of others: what they are sent is always the same, what they say is read as it is, and losses are marked."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import unittest
from pathlib import Path

import pytest
from sglang.benchmark.datasets.agentic_trace import AgenticTraceDataset
from transformers import AutoTokenizer

from benchmarks.methods import METHODS
from benchmarks.records import RecordWriter, read_records
from benchmarks.suites import kits, lm_harness, packages, retention, ruler
from benchmarks.suites.__main__ import parse_args
from benchmarks.suites.answers import Answers, check_samples, write_answers
from benchmarks.suites.conversations import draw_conversations, sources, write_trace
from benchmarks.suites.report import LOSS, table
from benchmarks.suites.sides import CONCURRENCY, PLAIN, Servers, Side
from benchmarks.suites.steps import Step, run_steps
from sglang_freekv.testing.tiny_model import TinyModel

RETRIEVAL = {"recalled_per_token": (2048.0, "bytes"), "corrected_rows": (0.25, "ratio")}
OURS = Side(METHODS["freekv-0.9"], 512)
ENVIRONMENT = {"cpu": "a CPU", "cores": 2, "gpu": None, "torch": "2", "sglang": "0"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    TinyModel(layers=2, hidden=128, heads=4, head_dim=32).write(folder)
    return folder


@pytest.fixture
def writer(tmp_path) -> RecordWriter:
    return RecordWriter("suites", tmp_path / "suites.jsonl", commit="none", environment=ENVIRONMENT)


# The conversation file


def test_a_conversation_is_the_same_every_time_and_fits_its_context(model):
    tokenizer, context, answer = AutoTokenizer.from_pretrained(model), 4000, 50
    conversations = draw_conversations(sources(), tokenizer, 3, 5, context, answer)
    assert conversations == draw_conversations(sources(), tokenizer, 3, 5, context, answer)
    for conversation in conversations:
        messages = []
        for turn in conversation:
            messages += [*turn["messages"], {"role": "assistant", "content": "x" * answer}]
        length = len(tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"])
        assert 0.8 * context < length <= context


def test_sglangs_loader_takes_every_turn_of_the_file(model, tmp_path):
    tokenizer, path = AutoTokenizer.from_pretrained(model), tmp_path / "folder" / "trace.json"
    write_trace(draw_conversations(sources(), tokenizer, 2, 4, 4000, 50), path)
    flags = {"dataset_path": str(path), "num_prompts": 2, "sharegpt_output_len": 50}
    arguments = argparse.Namespace(**flags, dataset_offset=0, agentic_max_turns=None)
    rows = AgenticTraceDataset.from_args(arguments).load(tokenizer)
    assert [len(row.prompt) for row in rows] == [4, 4]
    assert [message["role"] for message in rows[0].prompt[0]] == ["system", "user"]
    assert all(turn[0]["content"].startswith("$ cat ") for row in rows for turn in row.prompt[1:])


def test_turns_without_room_for_text_are_refused(model):
    with pytest.raises(ValueError, match="20 turns with answers of 200 tokens leave -32 of 4000 tokens"):
        draw_conversations(sources(), AutoTokenizer.from_pretrained(model), 1, 20, 4000, 200)


# What the suites say


def test_rulers_predictions_are_read_with_its_own_scores_of_the_samples(tmp_path):
    lines = [{"index": i, "pred": f"answer {i}", "input": f"prompt {i}", "outputs": ["x"]} for i in range(2)]
    (tmp_path / "vt.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "per_sample_scores.json").write_text(json.dumps({"vt": [20.0, 100.0]}))
    answers, prompts = ruler.read_answers(tmp_path, "vt", {})
    assert answers == Answers([0.2, 1.0], ["answer 0", "answer 1"], {})
    assert prompts == ["prompt 0", "prompt 1"]


def test_lm_evals_samples_are_read_in_the_order_of_its_documents(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    lines = [
        {"doc_id": i, "8192": i / 2, "4096": -1.0, "filtered_resps": [f"text {i}"], "prompt_hash": f"{i}"}
        for i in (1, 0)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples_ruler_vt_2026-11-28T11-40-13.190596.jsonl").write_text(text)
    (folder / "samples_ruler_fwe_2026-11-28T11-40-13.190596.jsonl").write_text("")
    answers, prompts = lm_harness.read_answers(tmp_path, "ruler_vt", 8192, {})
    assert (answers.scores, answers.texts, prompts) == ([0.0, 0.5], ["text 0", "text 1"], ["0", "1"])


@pytest.mark.parametrize("other", [["a", "c"], ["a"]])
def test_answers_to_other_prompts_are_not_compared(other):
    check_samples(["a", "b"], ["a", "b"], "RULER vt")
    with pytest.raises(ValueError, match="RULER vt: sample 1 is another on the two sides"):
        check_samples(["a", "b"], other, "RULER vt")


def test_a_number_that_cache_pressure_could_not_measure_is_zero():
    result = {"retained_tokens": 4000, "capacity_tokens": 16000, "cold_ttft": 2.0, "hit_ttft": None}
    numbers = retention.PROGRAMS["cache-pressure"].read(result)
    assert numbers == {"retained_share": (0.25, "of 1"), "cold_ttft": (2.0, "s"), "hit_ttft": (0.0, "s")}
    assert retention.PROGRAMS["agent-sim"].read({"records": []})["reuse"] == (0.0, "of 1")


# Records and tables


def write(writer: RecordWriter, task: str, full: list[float], ours: list[float]) -> None:
    params = {"suite": "ruler", "task": task, "context": 4096}
    whole = Answers(full, ["same"] * len(full), {})
    write_answers(writer, params, PLAIN.params, whole, whole)
    found = Answers(ours, ["same"] + ["other"] * (len(ours) - 1), RETRIEVAL)
    write_answers(writer, params, OURS.params, found, whole)


def test_a_task_that_scores_less_than_full_attention_is_marked_as_a_loss(writer):
    write(writer, "vt", [1.0, 0.5], [0.5, 0.25])
    write(writer, "cwe", [0.5, 0.5], [0.5, 0.5])
    write(writer, "fwe", [0.0, 0.0], [0.0, 0.0])
    header, *lines = table(read_records(writer.path), "ruler").lines
    rows = {line[1]: dict(zip(header, line, strict=True)) for line in lines}
    assert [row[""] for row in rows.values()] == [LOSS, "", ""]
    assert rows["vt"]["full"] == "0.750" and rows["vt"]["score [95 %]"].startswith("0.375 [")
    assert rows["vt"]["share of full [95 %]"].startswith("0.500 [")
    assert rows["vt"]["equal answers"] == "0.50" and rows["vt"]["recalled KiB/token"] == "2"
    assert rows["fwe"]["share of full [95 %]"] == "", "nothing is no share of nothing"


def test_the_summary_says_on_how_many_tasks_full_attention_scores(writer):
    write(writer, "vt", [1.0, 0.5], [0.5, 0.25])
    write(writer, "cwe", [0.25, 0.5], [0.5, 0.5])
    write(writer, "fwe", [0.0, 0.0], [0.0, 0.0])
    header, line = table(read_records(writer.path), "summary").lines
    row = dict(zip(header, line, strict=True))
    assert (row["tasks"], row["full above 0"], row["tasks better"], row["tasks worse"]) == ("3", "2", "1", "1")
    assert (row["full"], row["score"], row["share of full"]) == ("0.375", "0.292", "77.8%")


def test_numbers_beside_plain_sglangs_say_which_are_losses(writer):
    params = {"suite": "cache_pressure", "program": "agent-sim", "pool": 16384, **OURS.params}
    for metric, value, unit in (("final_ttft", 2.0, "s"), ("reuse", 0.5, "of 1"), ("decode_speed", 9.0, "tokens/s")):
        writer.write(metric, value, unit, params, baseline="plain SGLang", baseline_value=1.0)
    lines = table(read_records(writer.path), "cache_pressure").lines
    assert [line[-1] for line in lines[1:]] == [LOSS, LOSS, "win"]


def test_a_test_that_fails_on_both_sides_is_no_loss_and_one_that_fails_with_us_is(writer):
    for test, ours, plain, reason in (("test_a", 0.0, 0.0, "says | this"), ("test_b", 0.0, 1.0, "")):
        params = {"suite": "kits", "kit": "a_kit", "test": test, "reason": reason, **OURS.params}
        writer.write("passed", ours, "of 1", params, baseline="plain SGLang", baseline_value=plain)
    lines = table(read_records(writer.path), "kits").lines
    assert [(line[2], line[4], line[6]) for line in lines[1:]] == [("failed", "failed", ""), ("passed", "failed", LOSS)]
    assert lines[1][5] == "says \\| this", "a bar in a reason is no end of a cell"


# SGLang's kits


def test_the_kits_are_in_the_installed_wheel():
    for kit in (kit for group in kits.GROUPS for kit in group.kits):
        path = Path(importlib.util.find_spec(f"sglang.test.kits.{kit.module}").origin)
        assert re.search(rf"^(class|def) {kit.name}\b", path.read_text(), re.MULTILINE)


def test_every_outcome_is_kept_with_what_it_says_first():
    class Case(unittest.TestCase):
        def test_that_passes(self): ...

        def test_that_fails(self):
            self.assertEqual(1, 2)

        def test_that_ends_early(self):
            raise KeyError("a\nb")

        @unittest.skip("no time")
        def test_that_is_skipped(self): ...

    assert kits.run_tests(Case) == {
        "test_that_passes": ("passed", ""),
        "test_that_fails": ("failed", "AssertionError: 1 != 2"),
        "test_that_ends_early": ("failed", "KeyError: 'a\\nb'"),
        "test_that_is_skipped": ("skipped", "no time"),
    }


# Packages, servers, steps, command line


def test_every_package_has_a_version_and_a_checksum():
    lines = [line for line in packages.REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_packages_that_pip_does_not_get_are_a_sentence_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(packages.NotInstalled, match="start again with a network, or name another index in PIP_INDEX"):
        packages.packages(tmp_path / "build")
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["pip.log"]


def test_a_program_that_ends_early_says_its_last_lines(tmp_path):
    packages.run(["-c", "raise SystemExit(1)"], tmp_path / "log", packages.environment(tmp_path), (0, 1))
    with pytest.raises(packages.Failed, match=r"ended with status 3; its last messages .*:\nwhy"):
        packages.run(["-c", "print('why'); raise SystemExit(3)"], tmp_path / "log", packages.environment(tmp_path))


def test_both_sides_have_the_same_flags_but_those_of_retrieval(model, tmp_path):
    servers = Servers(model, tmp_path, ("--log-level", "warning"))
    plain = servers.flags_of(PLAIN, model, 4096, CONCURRENCY, ())
    ours = servers.flags_of(OURS, model, 4096, CONCURRENCY, ())
    assert ours[: len(plain)] == plain and plain[-2:] == ["--log-level", "warning"]
    more = dict(zip(ours[len(plain) :: 2], ours[len(plain) + 1 :: 2], strict=True))
    assert (more["--freekv-budget"], more["--freekv-tau"]) == ("512", "0.9")
    token_bytes = 2 * 2 * 2 * 32 * 2  # K and V, layers, KV heads, head_dim, bf16
    tokens = float(more["--freekv-device-blocks-memory"]) * 2**30 / token_bytes
    assert tokens == pytest.approx(2 * 512 * CONCURRENCY + 32, abs=0.1)


def test_a_step_that_fails_ends_no_other(capsys):
    ran = []
    steps = [
        Step("one", 1.0, lambda: ran.append(1)),
        Step("two", 2.0, lambda: 1 / 0),
        Step("three", 1.0, lambda: ran.append(3)),
    ]
    assert run_steps(steps) == ["two"] and ran == [1, 3]
    printed = capsys.readouterr()
    assert re.search(r"\[3/3\] three, about \d+ min left", printed.out) and "ZeroDivisionError" in printed.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing"], "there is no part 'nothing'"),
        (["--contexts", "4096", "--budgets", "512"], "as many --budgets and --samples as --contexts"),
        (["--contexts", "8192", "4096"], "in ascending order"),
        (["--methods", "nothing"], "unknown method 'nothing'"),
        (["--methods", "full"], "full attention runs always"),
        (["--tasks", "nothing"], "there is no task .nothing.; give some of niah_single_1, "),
    ],
)
def test_flags_that_fit_nothing_are_refused(flags, message, model, capsys):
    with pytest.raises(SystemExit):
        parse_args([*flags, "--model", str(model)])
    assert re.search(message, capsys.readouterr().err)


def test_a_quick_run_keeps_its_records_to_itself(model):
    args = parse_args(["ruler", "--quick", "--model", str(model), "--", "--log-level", "warning"])
    assert (args.contexts, args.budgets, args.samples) == ([4096], [512], [1])
    assert args.out.parent == packages.BUILD and args.server_flags == ["--log-level", "warning"]
