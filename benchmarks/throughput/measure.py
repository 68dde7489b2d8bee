"""One run of the client against one server, and the numbers that it gives: from the client's results, from the server's
own log, and from FreeKV's counters."""

from __future__ import annotations

import re
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from benchmarks.footprint import FULL_ATTENTION
from benchmarks.server import Server, retrieval_numbers
from benchmarks.throughput.client import bench_serving
from benchmarks.throughput.datasets import Dataset

PERCENTILES = {"p50": "median", "p95": "p95", "p99": "p99"}  # bench_serving's names
LATENCIES = ("ttft", "tpot", "itl")
_PREFILL = re.compile(
    r"Prefill batch.*?#new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+),.*?#running-req: (\d+),"
)
_DECODE = re.compile(r"Decode batch.*?#running-req: (\d+),")
# Of FreeKV's device memory, as /server_info names it.
_DEVICE_BYTES = (
    "device_blocks_bytes",
    "block_table_bytes",
    "page_summaries_bytes",
    "windows_bytes",
    "prefill_arena_bytes",
    "workspace_bytes",
)


class Number(NamedTuple):
    value: float
    unit: str


class Answer(NamedTuple):
    """One request, or a turn of a conversation."""

    text: str
    length: int | None  # tokens of prompt and answer; None where the client does not know


class Measurement(NamedTuple):
    numbers: dict[str, Number]  # by metric
    answers: list[Answer]  # in the order of the file, which is the same for every server


def measure(server: Server, dataset: Dataset, flags: list[str], out: Path, plain_token_bytes: int) -> Measurement:
    """Send a workload to a server whose cache is empty, or holds the workload's prefix.

    Parameters
    ----------
    flags : list of str
        Of bench_serving, for all workloads.
    out : Path
        File for bench_serving's results.
    plain_token_bytes : int
        Of a token in plain SGLang's KV cache.
    """
    flags = ["--base-url", server.url, *flags]
    server.flush_cache()
    if dataset.warm_flags is not None:
        bench_serving([*flags, *dataset.warm_flags], out.with_suffix(".warm.jsonl"))
    before, log_start = server.freekv(), server.log.stat().st_size
    result = bench_serving([*flags, *dataset.flags], out)
    with server.log.open("rb") as file:
        file.seek(log_start)
        log = file.read().decode(errors="replace")
    after = server.freekv()
    numbers = {**client_numbers(result), **log_numbers(log)}
    if after is None:
        numbers["device_bytes"] = Number(server.info()["max_total_num_tokens"] * plain_token_bytes, "bytes")
        numbers["host_bytes"] = Number(0, "bytes")
        numbers |= {name: Number(value, "ratio") for name, value in FULL_ATTENTION.records().items()}
    else:
        numbers["device_bytes"] = Number(device_bytes(after), "bytes")
        numbers["host_bytes"] = Number(after["host_bytes"], "bytes")
        numbers |= {name: Number(*number) for name, number in retrieval_numbers(before, after).items()}
    return Measurement(numbers, answers(result, dataset.knows_lengths))


def device_bytes(freekv: dict) -> int:
    """All of FreeKV's device memory, from its section of /server_info."""
    return sum(freekv[name] for name in _DEVICE_BYTES)


def client_numbers(result: dict) -> dict[str, Number]:
    """Throughputs and latencies as bench_serving computes them, and decoding alone."""
    numbers = {
        "finished": Number(result["completed"] / max(1, len(result["errors"])), "ratio"),
        "request_throughput": Number(result["request_throughput"], "requests/s"),
        "output_throughput": Number(result["output_throughput"], "tokens/s"),
    }
    if result["total_input_tokens"]:  # bench_serving does not count the input of conversations
        numbers["total_throughput"] = Number(result["total_throughput"], "tokens/s")
    for latency in LATENCIES:
        for name, prefix in PERCENTILES.items():
            numbers[f"{latency}_{name}"] = Number(result[f"{prefix}_{latency}_ms"], "ms")
    # Turns of a conversation follow one another.
    is_batch = result["max_concurrency"] is None and result["dataset_name"] != "agentic-trace"
    if is_batch and result["completed"] == len(result["errors"]):
        speed = decode_throughput(result["ttfts"], result["itls"])
        numbers |= {} if speed is None else {"decode_throughput": Number(speed, "tokens/s")}
    return numbers


def decode_throughput(ttfts: list[float], itls: list[list[float]]) -> float | None:
    """Tokens per second from when all requests have their first token until one of them ends; seconds.

    The requests have been sent at once. None where they never decode all together.
    """
    arrivals = [list(accumulate(gaps, initial=ttft)) for ttft, gaps in zip(ttfts, itls, strict=True)]
    start, end = max(ttfts), min(times[-1] for times in arrivals)
    if end <= start:
        return None
    return sum(start < time <= end for times in arrivals for time in times) / (end - start)


def log_numbers(log: str) -> dict[str, Number]:
    """Share of the prompts' tokens that came from the prefix cache, and most requests that ran at once."""
    prefills = [tuple(map(int, match)) for match in _PREFILL.findall(log)]
    new, cached = sum(prefill[1] for prefill in prefills), sum(prefill[2] for prefill in prefills)
    peak = max([*(p[0] + p[3] for p in prefills), *map(int, _DECODE.findall(log))], default=0)
    return {
        "prefix_hit_rate": Number(cached / max(1, new + cached), "ratio"),
        "peak_concurrency": Number(peak, "requests"),
    }


def answers(result: dict, knows_lengths: bool) -> list[Answer]:
    columns = zip(result["generated_texts"], result["input_lens"], result["output_lens"], strict=True)
    return [Answer(text, prompt + output if knows_lengths else None) for text, prompt, output in columns]


def equal_outputs(ours: list[Answer], plain: list[Answer], budget: int) -> float | None:
    """Share of equal answers among those that the budget covers; None where it covers none."""
    pairs = zip(ours, plain, strict=True)
    equal = [a.text == b.text for a, b in pairs if a.length is not None and a.length <= budget]
    return sum(equal) / len(equal) if equal else None
