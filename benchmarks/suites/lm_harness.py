"""RULER once more, as `lm-eval` has it: its tasks that generate themselves, by its `local-completions` model.

The other tasks (essays as haystack, SQuAD, HotpotQA) download their data, so they are not here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.server import Server, retrieval_numbers
from benchmarks.suites.answers import Answers, check_samples, write_answers
from benchmarks.suites.packages import environment, packages, run
from benchmarks.suites.ruler import TASKS as RULER_TASKS
from benchmarks.suites.sides import CONCURRENCY, Side
from benchmarks.suites.steps import Step, Suites

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
LONG_TASKS = ("niah_single_1", "ruler_vt")  # beyond the shortest context
QUICK_TASKS = ("niah_single_1",)
_START_SECONDS = 60  # it draws 500 samples of every task, whatever the limit


def steps(suites: Suites) -> list[Step]:
    """A step for each context, all tasks in it."""
    found = []
    for context, budget, samples in zip(suites.contexts, suites.budgets, suites.samples, strict=True):
        tasks = QUICK_TASKS if suites.is_quick else TASKS if context == suites.contexts[0] else LONG_TASKS
        if not (tasks := suites.wanted(tasks)):
            continue
        cost = _START_SECONDS + len(tasks) * (samples * context / 500 + _answer_tokens(tasks[0]) / 5)

        def work(tasks=tasks, context=context, budget=budget, samples=samples) -> None:
            _compare(suites, tasks, context, budget, samples)

        found.append(Step(f"lm-eval, {len(tasks)} tasks, {context:,} tokens", cost * (1 + len(suites.methods)), work))
    return found


def _answer_tokens(task: str) -> int:
    return RULER_TASKS[task.removeprefix("ruler_")]


def _compare(suites: Suites, tasks: tuple[str, ...], context: int, budget: int, samples: int) -> None:
    full: dict[str, tuple[Answers, list[str]]] = {}
    for side in suites.sides(budget):
        for task, (answers, prompts) in _answers(suites, side, tasks, context, samples).items():
            whole, asked = full.setdefault(task, (answers, prompts))
            check_samples(prompts, asked, f"lm-eval {task}, {context:,} tokens")
            params = {"suite": "lm_eval", "task": task, "context": context}
            write_answers(suites.writer, params, side.params, answers, whole)


def _answers(
    suites: Suites, side: Side, tasks: tuple[str, ...], context: int, samples: int
) -> dict[str, tuple[Answers, list[str]]]:
    """Answers and prompts of each task; retrieval is counted over all tasks of a run."""
    out = suites.folder / "lm_eval" / str(context) / side.name
    shutil.rmtree(out, ignore_errors=True)
    with suites.servers.use(side) as server:
        before = server.freekv()
        _run(suites.model, server, tasks, context, samples, out)
        counters = {} if before is None else retrieval_numbers(before, server.freekv())
    return {task: read_answers(out, task, context, counters) for task in tasks}


def _run(model: Path, server: Server, tasks: tuple[str, ...], context: int, samples: int, out: Path) -> None:
    place = packages()
    served = {
        "model": "served",
        "tokenizer": model,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "num_concurrent": CONCURRENCY,
        "max_length": context,
        "timeout": 1800,
    }
    command = ["-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in served.items())]
    command += ["--tasks", ",".join(tasks), "--limit", str(samples)]
    command += ["--metadata", json.dumps({"max_seq_lengths": [context], "tokenizer": str(model)})]
    run([*command, "--output_path", str(out), "--log_samples"], out / "log.txt", environment(place))


def read_answers(
    folder: Path, task: str, context: int, retrieval: dict[str, tuple[float, str]]
) -> tuple[Answers, list[str]]:
    """Read the samples that lm-eval logs, in the order of its documents.

    Returns
    -------
    The answers, and what identifies the prompts.
    """
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    lines = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda line: line["doc_id"])
    scores, texts = [line[str(context)] for line in lines], [line["filtered_resps"][0] for line in lines]
    return Answers(scores, texts, retrieval), [line["prompt_hash"] for line in lines]
