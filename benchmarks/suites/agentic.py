"""SGLang's own load generator on conversations of a coding agent: `bench_serving --dataset-name agentic-trace`.

It replays them turn by turn, with the server's real answers in the history.
"""

from __future__ import annotations

from transformers import AutoTokenizer

from benchmarks.suites.conversations import draw_conversations, sources, write_trace
from benchmarks.suites.sides import CONCURRENCY, PLAIN, TOKENS
from benchmarks.suites.steps import Step, Suites
from benchmarks.throughput.datasets import Dataset
from benchmarks.throughput.measure import Measurement, measure
from benchmarks.throughput.setups import PLAIN as BASELINE
from benchmarks.throughput.setups import Common

_CONVERSATIONS, _TURNS, _ANSWER = 3, 6, 48  # the last in tokens
_ROOM = 64  # tokens that a server keeps back of a context
METRICS = (
    "request_throughput",
    "output_throughput",
    "ttft_p50",
    "ttft_p95",
    "tpot_p50",
    "prefix_hit_rate",
    "device_bytes",
    "recalled_per_token",
    "corrected_rows",
)


def steps(suites: Suites) -> list[Step]:
    """One: the conversations fill the longest context."""
    cost = 120 * (1 + len(suites.methods)) / (4 if suites.is_quick else 1)
    return [Step("bench_serving, agentic-trace", cost, lambda: _compare(suites))]


def _compare(suites: Suites) -> None:
    context, budget = suites.contexts[-1], suites.budgets[-1]
    count, turns = (1, 3) if suites.is_quick else (_CONVERSATIONS, _TURNS)
    tokenizer = AutoTokenizer.from_pretrained(suites.model)
    path = suites.folder / "agentic" / "trace.json"
    conversations = draw_conversations(sources(), tokenizer, count, turns, context - _ROOM, _ANSWER)
    write_trace(conversations, path)
    flags = f"--backend sglang-oai-chat --dataset-name agentic-trace --dataset-path {path} --num-prompts {count}"
    flags += f" --sharegpt-output-len {_ANSWER} --max-concurrency {CONCURRENCY}"
    dataset = Dataset(flags.split(), None, knows_lengths=False)
    common = ["--model", str(suites.model), "--tokenizer", str(suites.model), "--seed", "42"]
    token_bytes = Common(suites.model, "auto", TOKENS, CONCURRENCY, context).token_bytes
    plain = None
    for side in suites.sides(budget):
        with suites.servers.use(side) as server:
            out = path.with_name(f"{side.name}.jsonl")
            measured = measure(server, dataset, common, out, token_bytes)
        plain = plain or measured
        if side is not PLAIN:
            params = {"suite": "agentic", "context": context, "conversations": count, "turns": turns, **side.params}
            _write(suites, params, measured, plain)


def _write(suites: Suites, params: dict, ours: Measurement, plain: Measurement) -> None:
    for metric in METRICS:
        value, other = ours.numbers[metric], plain.numbers.get(metric)
        compared = {} if other is None else {"baseline": BASELINE, "baseline_value": other.value}
        suites.writer.write(metric, value.value, value.unit, params, **compared)
    equal = [one.text == other.text for one, other in zip(ours.answers, plain.answers, strict=True)]
    suites.writer.write("equal_answers", sum(equal) / len(equal), "ratio", params)
