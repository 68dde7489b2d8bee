"""Programs of SGLang's frontend language: the answers of plain SGLang, shared text stored once, any budget."""

from __future__ import annotations

import random
import re
import string
from concurrent.futures import ThreadPoolExecutor

import pytest
import sglang as sgl

from benchmarks.programs.frontend import PATTERN, PROGRAMS, Job, converse, endpoint, run_batch, select
from tests.support.openai_requests import LOGPROB_TOLERANCE
from tools.servers import Server

PAGE_TOKENS = 32
NUM_QUESTIONS = 4
MAX_NEW_TOKENS = 32
TURN_END = ";\n"

all_programs = pytest.mark.parametrize("name", PROGRAMS)


def draw_jobs(rng: random.Random, count: int, num_tokens: int) -> list[Job]:
    """Documents of so many tokens, which are bytes, with questions and choices."""

    def text(length: int) -> str:
        return "".join(rng.choices(string.ascii_letters, k=length))

    return [
        Job(
            document=f"{text(num_tokens - 1)}\n",
            questions=[f"? {text(20)} =" for _ in range(NUM_QUESTIONS)],
            choices=[f" {text(12)}" for _ in range(NUM_QUESTIONS)],
        )
        for _ in range(count)
    ]


def texts_with_kv(name: str, job: Job, answers: list[str]) -> list[str]:
    """The texts of a program's requests, as far as they have KV; the last token of an answer has none."""
    question = job.document + job.questions[0]
    match name:
        case "fork":
            asked = [job.document + question + answer for question, answer in zip(job.questions, answers, strict=True)]
            return [text[:-1] for text in asked]
        case "select":
            return [question + choice for choice in job.choices]
        case "constrain":
            return [question + answer for answer in answers]  # what has none here is the end of the text
    turns = [question + answer + TURN_END for question, answer in zip(job.questions, answers, strict=True)]
    return [job.document + "".join(turns[:end])[: -len(TURN_END) - 1] for end in range(1, len(turns) + 1)]


def tokens_in_pages(texts: list[str]) -> int:
    """Tokens in the whole pages of these texts; where texts begin alike, their pages count once."""
    return PAGE_TOKENS * len({text[:end] for text in texts for end in range(PAGE_TOKENS, len(text) + 1, PAGE_TOKENS)})


@all_programs
def test_answers_are_those_of_plain_sglang(name: str, exact: Server, plain: Server, rng: random.Random):
    jobs = draw_jobs(rng, 3, 320)
    answers = run_batch(PROGRAMS[name], jobs, exact.url, MAX_NEW_TOKENS)
    assert answers == run_batch(PROGRAMS[name], jobs, plain.url, MAX_NEW_TOKENS)
    assert len({tuple(one) for one in answers}) == len(jobs), "each job has answers of its own"


@all_programs
def test_what_the_requests_of_a_program_share_is_stored_once(name: str, exact: Server, rng: random.Random):
    jobs = draw_jobs(rng, 2, 640)
    before = exact.freekv()
    assert before["tree_tokens"] == 0
    answers = run_batch(PROGRAMS[name], jobs, exact.url, MAX_NEW_TOKENS)
    after = exact.freekv()
    texts = [text for job, one in zip(jobs, answers, strict=True) for text in texts_with_kv(name, job, one)]
    if name != "constrain":  # one request for each job
        assert sum(map(len, texts)) > after["host_tokens"], "without sharing, they would fit as well"
    assert after["tree_tokens"] == tokens_in_pages(texts)
    assert after["tree_evicted_tokens"] == before["tree_evicted_tokens"]


def test_the_logprobs_of_choices(exact: Server, plain: Server, rng: random.Random):
    [job] = draw_jobs(rng, 1, 320)
    freekv, plain_sglang = (
        select.run(job.document, job.questions, job.choices, backend=endpoint(server.url)).get_meta_info("answer")
        for server in (exact, plain)
    )
    name = "normalized_prompt_logprobs"
    assert freekv[name] == pytest.approx(plain_sglang[name], abs=LOGPROB_TOLERANCE)


def test_a_streamed_program(exact: Server, plain: Server, rng: random.Random):
    [job] = draw_jobs(rng, 1, 320)

    def stream(server: Server) -> list[str]:
        options = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS, "backend": endpoint(server.url)}
        return list(converse.run(job.document, job.questions[:2], stream=True, **options).text_iter())

    freekv = stream(exact)
    assert len(freekv) > 10
    assert "".join(freekv) == "".join(stream(plain))


def test_beyond_the_budget_all_programs_finish_and_pages_stay_whole(narrow: Server, rng: random.Random):
    """All of them at the same time, over documents of eight times the budget."""
    jobs = {name: draw_jobs(rng, 2, 1024) for name in PROGRAMS}
    before = narrow.freekv()
    with ThreadPoolExecutor(len(jobs)) as pool:
        batches = pool.map(lambda name: run_batch(PROGRAMS[name], jobs[name], narrow.url, MAX_NEW_TOKENS), jobs)
        answers = dict(zip(jobs, batches, strict=True))
    after = narrow.freekv()
    for name in ("fork", "converse"):
        assert [len(answer) for one in answers[name] for answer in one] == [MAX_NEW_TOKENS] * 2 * NUM_QUESTIONS
    assert all(one[0] in job.choices for one, job in zip(answers["select"], jobs["select"], strict=True))
    assert all(re.fullmatch(PATTERN, one[0]) for one in answers["constrain"])
    assert after["rows"] > before["rows"], "no request was over its budget"
    assert after["absent_pages"] == before["absent_pages"]
    texts = [
        text
        for name in jobs
        for job, one in zip(jobs[name], answers[name], strict=True)
        for text in texts_with_kv(name, job, one)
    ]
    assert after["tree_tokens"] == tokens_in_pages(texts)
    narrow.flush()
    state = narrow.freekv()
    assert state["tree_tokens"] == state["tree_protected_tokens"] == 0


def test_a_regex_that_does_not_compile_fails_alone(exact: Server, plain: Server):
    @sgl.function
    def answer(s, regex):
        s += "a"
        s += sgl.gen("answer", regex=regex)
        return s["answer"]

    # A backreference: Python knows it, the grammar backends do not.
    for server in (exact, plain):
        with pytest.warns(UserWarning, match="stream_executor"), pytest.raises(KeyError):
            answer.run(r"(a)\1", backend=endpoint(server.url))
        assert re.fullmatch("[0-9]{3}", answer.run("[0-9]{3}", backend=endpoint(server.url)).ret_value)
