"""What phases make of whole engines' answers: tokens against plain SGLang's, what was recalled, and times of calls."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.gpu import language_check, serve_throughput
from benchmarks.gpu.serve_check import Engine
from benchmarks.gpu.session import Session
from benchmarks.records import read_records


def engine(name: str, tokens: list[list[int]], **state: object) -> Engine:
    """Answers every call with these tokens; counters advance by `state` in each."""
    replies = [
        {"output_ids": ids, "meta_info": {"output_token_logprobs": [(-0.5, t) for t in ids], "cached_tokens": 300}}
        for ids in tokens
    ]
    states = [{key: n * value for key, value in state.items()} for n in range(4)]
    return Engine(name, {}, {"replies": [replies] * 3, "states": states, "seconds": [1, 2, 4], "start_seconds": 9})


COUNTED = {"rows": 8, "flagged_rows": 2, "recalled_bytes": 8e6, "absent_pages": 0}


class TestWholeEngines:
    @pytest.fixture
    def session(self, tmp_path: Path) -> Session:
        return Session("serve", tmp_path, 100, is_rehearsal=True)

    def answer(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, *answers: Engine) -> None:
        """Engines answer so, in their order, instead of being started."""
        left = list(answers)

        def run_engines(_, engines: list[Engine], calls: list[dict]) -> None:
            for asked in engines:
                asked.result = left.pop(0).result

        monkeypatch.setattr(module, "run_engines", run_engines)

    def test_equal_tokens_end_with_the_first_that_differs(self):
        plain, other = engine("a", [[1, 2, 3, 4], [5, 6]]), engine("b", [[1, 2, 9, 4], [5, 6]])
        assert language_check.agreement(plain.replies(0), other.replies(0)) == (4 / 6, 0.0)

    def test_a_language_model_that_says_something_else_is_noticed(self, session, monkeypatch):
        plain = engine("plain", [[1, 2, 3, 4]])
        self.answer(monkeypatch, language_check, plain, engine("freekv", [[1, 2, 3, 9]], **COUNTED))
        language_check.run(session)
        self.answer(monkeypatch, language_check, plain, engine("freekv", [[9, 2, 3, 4]], **COUNTED))
        with pytest.raises(AssertionError, match=r"says what plain SGLang says: 0.00 of the tokens"):
            language_check.run(session)

    @pytest.mark.parametrize(
        ("change", "fault"),
        [({"recalled_bytes": 0}, "recalls pages"), ({"absent_pages": 1}, "no page of it was absent")],
    )
    def test_a_language_model_that_recalls_nothing_or_misses_pages_is_noticed(
        self, session, monkeypatch, change, fault
    ):
        answers = engine("plain", [[1, 2]]), engine("freekv", [[1, 2]], **(COUNTED | change))
        self.answer(monkeypatch, language_check, *answers)
        with pytest.raises(AssertionError, match=fault):
            language_check.run(session)

    def test_a_language_model_that_was_not_brought_along_fails_the_phase(self, session, monkeypatch, tmp_path):
        monkeypatch.setattr(language_check, "FOLDER", tmp_path / "nothing")
        session.is_rehearsal = False
        with pytest.raises(FileNotFoundError, match=r"make it with python -m tools.pretrained"):
            language_check._model(session)

    def test_prefill_and_decode_of_whole_engines_are_numbers_of_their_own(self, session, monkeypatch):
        answers = engine("plain", [[1] * 4] * 2), engine("freekv", [[1] * 4] * 2, **COUNTED)
        self.answer(monkeypatch, serve_throughput, *answers)
        serve_throughput.run(session)
        found = [r for r in read_records(session.records) if r.metric.startswith("served")]
        assert [(r.metric, r.params["mode"], r.value) for r in found] == [
            ("served_prefill", "plain", 320.0),
            ("served_throughput", "plain", 2.0),
            ("served_prefill", "freekv", 320.0),
            ("served_throughput", "freekv", 2.0),
        ]
        assert (found[-1].params["flagged"], found[-1].params["recalled_mb"]) == (0.25, 1.0)

    def test_prompts_that_are_computed_again_are_not_taken_for_decoding(self, session, monkeypatch):
        cold = engine("plain", [[1] * 4] * 2)
        cold.replies(2)[0]["meta_info"]["cached_tokens"] = 0
        self.answer(monkeypatch, serve_throughput, cold, cold)
        with pytest.raises(AssertionError, match="plain finds its prompts in the cache: 0 of 320 tokens"):
            serve_throughput.run(session)
