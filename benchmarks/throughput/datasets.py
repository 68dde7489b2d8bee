"""Writes a workload as a file that `bench_serving` reads; its own generators draw lengths uniformly, and decode random
token ids, whose text can be several times as long."""

from __future__ import annotations

import json
import math
import random
import string
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from benchmarks.throughput.workloads import Workload

_CHAT = {"openai", "agentic-trace"}  # these hold messages, which go to the chat API


class Dataset(NamedTuple):
    """Files of a workload."""

    flags: list[str]  # of bench_serving
    warm_flags: list[str] | None  # of the run before, which brings the prefix into the cache
    knows_lengths: bool  # whether bench_serving's lengths are those of a request's last token


def write_dataset(workload: Workload, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Dataset:
    """Write the files of a workload; equal workloads give equal files.

    Raises
    ------
    FileNotFoundError
        If the user's own file is missing; bench_serving would try to download one.
    """
    if workload.dataset is not None:
        name, path = workload.dataset
        if not path.is_file():
            raise FileNotFoundError(f"--dataset-path {path} does not exist; give a file of the kind {name!r}")
        return Dataset(_flags(workload, name, path), None, knows_lengths=name != "agentic-trace")
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{workload.name}-{workload.context}-{workload.requests}"
    text = Text(tokenizer, seed=stem)
    prefix = text.take(workload.prefix)
    if workload.turns > 1:
        path = folder / f"{stem}.json"
        path.write_text(json.dumps({"conversations": _conversations(workload, text, prefix)}))
        return Dataset(_flags(workload, "agentic-trace", path), None, knows_lengths=True)
    path, warm = folder / f"{stem}.jsonl", folder / f"{stem}-warm.jsonl"
    _write_lines(path, [_question(workload, text, prefix) for _ in range(workload.requests)])
    if not workload.prefix:
        return Dataset(_flags(workload, "custom", path), None, knows_lengths=True)
    _write_lines(warm, [_question(workload, text, prefix)])
    return Dataset(_flags(workload, "custom", path), _flags(workload, "custom", warm), knows_lengths=True)


def _flags(workload: Workload, name: str, path: Path) -> list[str]:
    flags = ["--dataset-name", name, "--dataset-path", str(path), "--num-prompts", str(workload.requests)]
    flags += ["--backend", "sglang-oai-chat" if name in _CHAT else "sglang"]
    if name == "agentic-trace" or workload.dataset is not None:
        flags += ["--sharegpt-output-len", str(workload.output[1])]
    return flags + (["--max-concurrency", str(workload.concurrency)] if workload.concurrency else [])


def _question(workload: Workload, text: Text, prefix: str) -> dict:
    """A prompt, and a completion that is as long as the one to generate."""
    prompt, completion = text.draw(workload.prompt), text.draw(workload.output)
    return {"conversations": [{"content": prefix + prompt}, {"content": completion}]}


def _conversations(workload: Workload, text: Text, prefix: str) -> list[list[dict]]:
    def turn(number: int) -> dict:
        content = (prefix if number == 0 else "") + text.take(workload.prompt[1])
        # bench_serving gives this back as the length of every turn's prompt: that of the last one.
        return {"messages": [{"role": "user", "content": content}], "prompt_tokens": workload.longest}

    return [[turn(number) for number in range(workload.turns)] for _ in range(workload.requests)]


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Text:
    """Words of random letters, cut to numbers of tokens; equal seeds give equal text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: str) -> None:
        self._tokenizer, self._rng = tokenizer, random.Random(seed)

    def take(self, tokens: int) -> str:
        """Text of so many tokens; where it is joined to other text, a tokenizer may merge one."""
        ids: list[int] = []
        while len(ids) < tokens:
            words = " ".join(self._word() for _ in range(tokens // 6 + 8)) + " "
            ids += self._tokenizer.encode(words, add_special_tokens=False)
        return self._tokenizer.decode(ids[:tokens])

    def _word(self) -> str:
        return "".join(self._rng.choices(string.ascii_lowercase, k=self._rng.randint(2, 9)))

    def draw(self, shortest_longest: tuple[int, int]) -> str:
        """Text of a length drawn log-uniformly."""
        low, high = map(math.log, shortest_longest)
        return self.take(round(math.exp(self._rng.uniform(low, high))))
