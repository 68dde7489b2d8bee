"""The client: what it sends of a conversation, of a text with a question, and of a text to continue."""

from __future__ import annotations

import copy
import io
import types
from typing import Any

import pytest

from tools import ask
from tools.servers import free_port

USAGE = types.SimpleNamespace(prompt_tokens=1234, completion_tokens=2)


class FakeOpenAI:
    """Answers `answer 1`, `answer 2`, ... and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.chat = types.SimpleNamespace(completions=types.SimpleNamespace(create=self._chat))
        self.completions = types.SimpleNamespace(create=self._complete)

    def _chat(self, **options):
        self.asked.append(copy.deepcopy(options))
        for word in ("answer ", str(len(self.asked)), None):
            delta = types.SimpleNamespace(content=word)
            yield types.SimpleNamespace(choices=[types.SimpleNamespace(delta=delta)], usage=None)
        yield types.SimpleNamespace(choices=[], usage=USAGE)

    def _complete(self, **options):
        self.asked.append(options)
        return types.SimpleNamespace(choices=[types.SimpleNamespace(text=" and so on ")], usage=USAGE)


@pytest.fixture
def openai(monkeypatch: pytest.MonkeyPatch) -> FakeOpenAI:
    fake = FakeOpenAI()
    monkeypatch.setattr(ask, "OpenAI", lambda **_: fake)
    return fake


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, piped: str | None = None, typed: str = "") -> int:
    """Run the client with a text piped in, or with lines from a keyboard."""
    stdin = io.StringIO(typed if piped is None else piped)
    monkeypatch.setattr(stdin, "isatty", lambda: piped is None, raising=False)
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr("sys.argv", ["ask", *arguments])
    return ask.main()


def test_each_turn_of_a_conversation_comes_with_all_before_it(openai, monkeypatch, capsys):
    assert run(monkeypatch, "http://a", typed="one\n\ntwo\n") == 0
    first, second = (asked["messages"] for asked in openai.asked)
    assert first == [{"role": "user", "content": "one"}]
    answer = {"role": "assistant", "content": "answer 1"}
    assert second == [*first, answer, {"role": "user", "content": "two"}]
    assert "answer 1\n" in capsys.readouterr().out


def test_a_question_comes_after_the_text_that_is_piped_in(openai, monkeypatch, capsys):
    assert run(monkeypatch, "http://a", "Why?", piped="A text.\n") == 0
    assert openai.asked[0]["messages"] == [{"role": "user", "content": "A text.\n\nWhy?"}]
    printed = capsys.readouterr()
    assert printed.out == "answer 1\n"
    assert printed.err == "(1,234 tokens read, 2 generated)\n"


@pytest.mark.parametrize("piped", [None, ""])
def test_a_question_needs_no_text(piped, openai, monkeypatch):
    assert run(monkeypatch, "http://a", "Why?", piped=piped) == 0
    assert openai.asked[0]["messages"] == [{"role": "user", "content": "Why?"}]


def test_a_text_without_a_question_is_continued_as_it_is(openai, monkeypatch, capsys):
    assert run(monkeypatch, "http://a", "--max-tokens", "7", piped="Once\n") == 0
    assert (openai.asked[0]["prompt"], openai.asked[0]["max_tokens"]) == ("Once", 7)
    assert capsys.readouterr().out == "and so on\n"


def test_without_a_server_it_says_how_to_start_one(monkeypatch, capsys):
    url = f"http://127.0.0.1:{free_port()}"
    assert run(monkeypatch, url, "Why?") == 1
    assert capsys.readouterr().err == f"no server answers at {url}; start one: make serve\n"
