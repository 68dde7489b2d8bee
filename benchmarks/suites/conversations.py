"""Conversations of a coding agent as SGLang's `agentic-trace` reads them: turns bring the outputs of tools.

The text is this project's documents and sources and the standard library's, so equal files give equal conversations.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from benchmarks.records import ROOT

_SYSTEM = (
    "You are a software engineer. You read the outputs of the tools that you call, and say what you learn from them."
)
_TASKS = (
    "Find out where {name} keeps its state, and who may change it.",
    "Explain how an error reaches the caller of {name}.",
    "Write a plan for testing {name}: what must always hold, and what can go wrong.",
)
_LIBRARY = ("argparse", "asyncio.streams", "configparser", "csv", "datetime", "heapq", "json.decoder", "logging")
_OF_PROJECT = ("*.md", "sglang_freekv/*/*.py", "tools/*/*.py")
_SHORTEST = 5000  # characters of a source: a tool's output is long
_CHARACTERS = 8  # of a token, at most, on average
_OVERHEAD = 32  # tokens of a turn: what the chat template adds, and what joining texts may


class Source(NamedTuple):
    name: str
    text: str


def sources() -> list[Source]:
    """Texts of the project and of the standard library, always in the same order."""
    own = [path for pattern in _OF_PROJECT for path in sorted(ROOT.glob(pattern))]
    library = [Source(name.replace(".", "/") + ".py", inspect.getsource(import_module(name))) for name in _LIBRARY]
    found = [*(Source(str(path.relative_to(ROOT)), path.read_text()) for path in own), *library]
    return [source for source in found if len(source.text) >= _SHORTEST]


def draw_conversations(
    texts: Iterable[Source], tokenizer: PreTrainedTokenizerBase, count: int, turns: int, context: int, answer: int
) -> list[list[dict]]:
    """Draw so many conversations.

    Parameters
    ----------
    turns : int
        Of each.
    context, answer : int
        Tokens of a whole conversation, with the answers, and of one answer.

    Raises
    ------
    ValueError
        If a turn would have no text.
    """
    room = context // turns - answer - _OVERHEAD
    if room < _OVERHEAD:
        raise ValueError(
            f"{turns} turns with answers of {answer} tokens leave {room} of {context} tokens for a turn's text; "
            f"give fewer turns, shorter answers or more context"
        )
    rng, texts = random.Random(0), list(texts)
    return [_conversation(rng.sample(texts, turns), tokenizer, rng, room, context) for _ in range(count)]


def _conversation(
    texts: list[Source], tokenizer: PreTrainedTokenizerBase, rng: random.Random, room: int, context: int
) -> list[dict]:
    turns = []
    for number, (name, text) in enumerate(texts):
        task = rng.choice(_TASKS).format(name=name)
        beginning = f"{task}\n\n$ cat {name}\n" if number == 0 else f"$ cat {name}\n"
        # `prompt_tokens` is what the file's format wants, and only said back.
        message = {"role": "user", "content": _cut(beginning + text, tokenizer, room)}
        system = [{"role": "system", "content": _SYSTEM}] if number == 0 else []
        turns.append({"messages": [*system, message], "prompt_tokens": context})
    return turns


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """The beginning of a text, up to so many tokens; without half a character at the end."""
    ids = tokenizer.encode(text[: tokens * _CHARACTERS], add_special_tokens=False)
    return tokenizer.decode(ids[:tokens]).rstrip("\ufffd")


def write_trace(conversations: list[list[dict]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metadata": {}, "conversations": conversations}, indent=1))
