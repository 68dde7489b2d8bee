"""The real-model benchmark: what it compares, what it looks at inside the engine, and what it says of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.accuracy.intervals import bootstrap
from benchmarks.footprint import Footprint
from benchmarks.methods import METHODS
from benchmarks.real_model import pictures
from benchmarks.real_model.compare import Comparison, compare
from benchmarks.real_model.job import Cell, Job, whole_pages
from benchmarks.real_model.probe import page_mass, turnover
from benchmarks.real_model.processes import run_in_process
from benchmarks.real_model.summary import table, write_drift, write_full, write_records
from benchmarks.real_model.texts import digest, draw_texts
from benchmarks.real_model.worker import config_of, share_processes
from benchmarks.records import RecordWriter
from sglang_freekv.memory.page_indexes import index_of

KINDS = ["prose", "prose", "chat"]


def test_equal_distributions_have_no_divergence_and_others_have_the_sum():
    full = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).log()
    same = compare(full, full + 3, torch.tensor([0, 1]))
    assert torch.allclose(same.kl, torch.zeros(2), atol=1e-6)
    assert same.agrees.tolist() == [1, 1]
    assert torch.allclose(same.nll, same.nll_full)
    other = compare(full, torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).log(), torch.tensor([0, 1]))
    assert other.kl[0].item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-6)
    assert other.agrees.tolist() == [0, 1]
    assert other.nll[0].item() == pytest.approx(math.log(4))


def test_the_mass_of_pages_is_that_of_softmax_over_the_requests_tokens_only():
    torch.manual_seed(0)
    q, keys, num_tokens, scale = torch.randn(2, 3, 8), torch.randn(5, 2, 4, 8), 18, 0.3
    keys[4, :, 2:] = 1e4  # what an earlier owner of the page has left
    mass = page_mass(q, keys, num_tokens, scale)
    assert torch.allclose(mass.sum(-1), torch.ones(2))
    for head in range(2):
        flat = keys[:, head].reshape(-1, 8)[:num_tokens]
        shares = torch.stack([(flat @ one * scale).softmax(0) for one in q[head]]).mean(0)
        expected = [shares[4 * page : 4 * page + 4].sum() for page in range(5)]
        assert torch.allclose(mass[head], torch.stack(expected), atol=1e-6)


def test_turnover_counts_selected_pages_only():
    before = torch.tensor([[[0, 3, 5, 9, 10, -1]]])
    window = torch.tensor([[[0, 3, 7, 10, 11, -1]]])  # 11 is recent, 10 was
    assert turnover(window, before, sink=1, recent=1).item() == pytest.approx(1 / 3)
    assert turnover(window, window, sink=1, recent=1).item() == 0
    assert turnover(window[..., :2], before, sink=1, recent=1).item() == 0


def test_an_interval_has_the_mean_inside_and_shrinks_with_the_number_of_texts():
    rng = np.random.default_rng(0)
    few, many = bootstrap(rng.normal(2, 1, 6)), bootstrap(rng.normal(2, 1, 600))
    assert few.low < few.value < few.high
    assert many.high - many.low < (few.high - few.low) / 3


class Words:
    """A tokenizer of words, with or without a format of conversations."""

    chat_template = None

    @staticmethod
    def encode(text: str) -> list[int]:
        return [len(word) for word in text.split()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    asked = [{"question": f"why {i}?", "answers": [{"text": "so"}] if i else []} for i in range(6)]
    articles = [{"title": f"t{n}", "paragraphs": [{"context": "many words here " * 9, "qas": asked}]} for n in (0, 1)]
    (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "word " * 30_000}))
    (tmp_path / "book.txt").write_text("one two three " * 40)
    return tmp_path


def test_texts_are_the_same_each_time_of_one_length_and_named(data: Path):
    kinds = ["prose", "chat", "code", str(data / "book.txt")]
    texts = draw_texts(kinds, 2, 30, Words, data)
    assert [text.kind for text in texts] == ["prose", "prose", "chat", "chat", "code", "code", "book"]
    assert {len(text.tokens) for text in texts} == {30}
    assert digest(texts) == digest(draw_texts(kinds, 2, 30, Words, data)) != digest(texts[1:])


def test_too_few_texts_are_refused_with_what_there_is(data: Path):
    with pytest.raises(ValueError, match="chat: 3 texts of 30 tokens wanted, 2 found"):
        draw_texts(["chat"], 3, 30, Words, data)


def test_a_conversation_alternates_and_answers_what_has_no_answer(data: Path):
    seen: list[list[dict]] = []

    def apply_chat_template(turns: list[dict], tokenize: bool) -> str:
        seen.append(turns)
        return "word " * 100

    tokenizer = SimpleNamespace(chat_template="yes", apply_chat_template=apply_chat_template, encode=Words.encode)
    draw_texts(["chat"], 1, 30, tokenizer, data)
    assert [turn["role"] for turn in seen[0]] == ["user", "assistant"] * (len(seen[0]) // 2)
    assert seen[0][1]["content"] == "The text does not say."
    assert seen[0][3]["content"] == "so"


def test_methods_share_a_process_with_one_whose_index_has_all_they_read():
    cells = [Cell(method, 4096, 512) for method in METHODS.values() if not method.is_full]
    groups = share_processes(cells)
    assert sorted(id(cell) for group in groups for cell in group) == sorted(map(id, cells))
    for group in groups:
        indexes = [index_of(config_of(cell)) for cell in group]
        assert all(issubclass(indexes[0], index) for index in indexes)
    assert len(groups) == 2  # codes with minimum and maximum, and ArkVale's balls


def test_slots_hold_the_texts_and_what_each_method_writes():
    job = Job("m", "float32", "cpu", ((1,) * 400,) * 3, (256, 320), 70, 8, 2.0, Path())
    assert job.num_tokens == 320 + 70 + 1
    assert job.num_slots == 3 * (whole_pages(391) + whole_pages(64 + 70)) + 64
    assert whole_pages(1) == whole_pages(64) == 64


def _ends(fails: bool):
    yield "first"
    if fails:
        raise ValueError("no such thing")
    yield "second"


def test_a_process_yields_what_its_generator_yields():
    assert list(run_in_process(_ends, False)) == ["first", "second"]


def test_a_failure_in_a_process_is_raised_with_its_traceback():
    items = run_in_process(_ends, True)
    assert next(items) == "first"
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        next(items)


def comparison(method: str, kl: float, budget: int = 512) -> Comparison:
    steps, texts, layers = 4, len(KINDS), 2
    nll_full = np.full((steps, texts), 2.0)
    predictions = np.stack([np.full((steps, texts), kl), nll_full, nll_full + kl, np.ones((steps, texts))], 1)
    shape = (steps, texts, layers)
    arrays = {name: np.full(shape, 0.5) for name in ("similarity", "flagged", "turnover", "kept", "best")}
    return Comparison(
        method,
        4096,
        budget,
        predictions,
        **arrays,
        exposed_bytes=2048,
        hidden_bytes=1024,
        pages=16.0,
        scored=0.25,
        footprint=Footprint(0.3, 1.0),
    )


def test_the_table_ranks_methods_by_divergence_and_shows_the_ratio_of_perplexities(tmp_path: Path):
    writer = RecordWriter("real_model", tmp_path / "r.jsonl", commit="c")
    records = [
        record
        for found in (comparison("worse", 0.2), comparison("better", 0.1), comparison("whole", 0.0, 4160))
        for record in (*write_records(found, KINDS, writer, {}), *write_drift(found, KINDS, writer, {}))
    ]
    records += write_full(comparison("any", 0.5), KINDS, writer, {})
    lines = table(records, "4096:512").lines
    assert {line[0] for line in lines[1:3]} == {"full", "whole"}
    assert [line[0] for line in lines[3:]] == ["better", "worse"]
    of_worse = dict(zip(lines[0], lines[4], strict=True))
    assert of_worse["perplexity"] == f"{math.exp(2.2):.3g}"
    assert of_worse["times full"].startswith(f"{math.exp(0.2):.4g} [")
    assert of_worse["KiB/token, waited for"] == "2" and of_worse["KiB/token, hidden"] == "1"
    assert of_worse["rows scored"] == "0.25"
    assert len(table(records, "4096:512:chat").lines) == 5
    assert all(path.stat().st_size > 1000 for path in pictures.draw(records, tmp_path))
