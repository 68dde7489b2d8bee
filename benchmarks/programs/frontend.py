"""The programs, the documents that they work on, and how a batch of them runs on a server."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import sglang as sgl
from sglang.lang.chat_template import ChatTemplate, register_chat_template

from benchmarks.needle import documents as doc
from benchmarks.needle.language import build_tokenizer

NUM_QUESTIONS = 4  # of a document: branches, choices, turns
PATTERN = r"( [a-z]{1,12}){4};"  # of an answer: a key of two words, a value of two, and what ends the model's lines
_SHARE_OF_RECORDS = 0.3  # of a document's tokens
_RECORD_TOKENS = 7

# Roles leave no trace in the text: the model knows lines, and a semicolon ends an answer.
_LINES = "lines"
register_chat_template(
    ChatTemplate(_LINES, None, {"system": ("", ""), "user": ("", ""), "assistant": ("", ";\n")}),
)


class Job(NamedTuple):
    """What a program works on."""

    document: str
    questions: list[str]
    choices: list[str]  # answers; the first is the first question's


@sgl.function
def fork(s, document, questions):
    """Ask each question in a branch of its own."""
    s += document
    branches = s.fork(len(questions))
    for branch, question in zip(branches, questions, strict=True):
        branch += question
        branch += sgl.gen("answer")
    branches.join()
    return s["answer"]


@sgl.function
def select(s, document, questions, choices):
    """Choose the answer to the first question."""
    s += document
    s += questions[0]
    s += sgl.select("answer", choices)
    return [s["answer"]]


@sgl.function
def constrain(s, document, questions):
    """Answer the first question within a regular expression."""
    s += document
    s += questions[0]
    s += sgl.gen("answer", regex=PATTERN, max_tokens=64)
    return [s["answer"]]


@sgl.function
def converse(s, document, questions):
    """Ask one question after the other; each turn's prompt holds the turns before."""
    s += sgl.system(document)
    for i, question in enumerate(questions):
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen(f"answer_{i}"))
    return [s[f"answer_{i}"] for i in range(len(questions))]


PROGRAMS = {program.func.__name__: program for program in (fork, select, constrain, converse)}


def endpoint(url: str) -> sgl.RuntimeEndpoint:
    """A server for programs to run on."""
    return sgl.RuntimeEndpoint(url, chat_template_name=_LINES)


def run_batch(program: sgl.SglFunction, jobs: Sequence[Job], url: str, max_new_tokens: int = 32) -> list[list[str]]:
    """Run a program over jobs that start together, greedily; return the answers of each."""
    arguments = [{name: getattr(job, name) for name in program.arg_names} for job in jobs]
    states = program.run_batch(arguments, temperature=0, max_new_tokens=max_new_tokens, backend=endpoint(url))
    return [state.ret_value for state in states]


def draw_job(rng: Random, context: int) -> Job:
    """A document of `context` tokens, and questions about it."""
    keys = doc.draw_keys(rng, int(context * _SHARE_OF_RECORDS) // _RECORD_TOKENS)
    records = [doc.Record(key, doc.draw_words(rng, 2)) for key in keys]
    lines = doc.mix(rng, [record.line() for record in records], context)
    decode = build_tokenizer(context)[0].decode
    return Job(
        document=decode([token for line in lines for token in line]).rstrip("\n") + "\n",
        questions=[decode(doc.question([record.key])) for record in records[:NUM_QUESTIONS]],
        choices=[decode(doc.answer([record])[:-1]) for record in records[:NUM_QUESTIONS]],
    )
