"""Plain SGLang and FreeKV side by side on a CPU: decode throughput, time to first token, device memory.

    python -m benchmarks.bench_cpu [--quick] [-- --freekv-tau 0.8]

Two servers with the same model and flags live through the whole run, and only one of them ever runs: the other
is frozen (SIGSTOP). For each context length and batch size
- both read the prompts (time to first token: the document cold, then with all of it but the last page in the
  prefix cache);
- they decode in turns, some steps each, several rounds. A step's time is that between two messages of a stream,
  so prefill is not in it; the first message after a turn begins is skipped. Each round gives a ratio, and the
  median of the ratios is reported, so what disturbs the machine meets both.

The requests of a batch share one document of the given length and differ in their last page. This is what keeps
the prefill of plain SGLang's CPU attention affordable; its decode attention gathers the complete KV of each request
all the same. `--distinct` gives each request a document of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records import RESULTS, ROOT, RecordWriter
from benchmarks.server import Chunk, Server, device_bytes_per_request, retrieval_numbers
from sglang_freekv.tiny_model import TinyModel

BASELINE = "plain SGLang"
PAGE_SIZE = 32
BUILD = ROOT / "build" / "bench_cpu"
# Streaming costs the client's and the tokenizer's share of two cores; messages of eight tokens make it small.
STREAM_INTERVAL = 8
# Above the largest batch: the requests of the cell before may not have left when the next batch comes.
SPARE_REQUESTS = 4
_RECALL = ("recalled_per_token", "hit_share", "corrected_rows", "absent_pages")
GOALS = {(32768, 8): 4.0, (1024, 8): 0.9, (1024, 1): 0.9}  # (context, batch) -> least ratio


@dataclass(frozen=True)
class Cell:
    """One row of the table: a context length and a batch size."""

    context: int  # tokens of each prompt
    batch: int

    @property
    def cost(self) -> float:
        """Relative time it takes, for the estimate: the batch's prefill in plain SGLang, and a constant."""
        return 1 + (self.batch + 2) * (self.context / 8192) ** 2

    def prompts(self, distinct: bool) -> list[list[int]]:
        """Token ids: one document (or `batch` documents) and a last page of its own for each request."""
        rng = random.Random(self.context)
        shared = rng.choices(range(256), k=self.context - PAGE_SIZE)
        documents = [rng.choices(range(256), k=len(shared)) if distinct else shared for _ in range(self.batch)]
        rng.seed(f"{self.context} {self.batch}")
        return [document + rng.choices(range(256), k=PAGE_SIZE) for document in documents]


class Turns:
    """A batch that decodes on one server, a number of steps at a time; the server is frozen in between."""

    def __init__(self, server: Server, prompts: list[list[int]], max_new_tokens: int) -> None:
        self.server = server
        self._batch = len(prompts)
        with server.thawed():
            self._chunks = server.decode(prompts, max_new_tokens)
            waiting = set(range(self._batch))
            while waiting:  # all of them are decoding from here on
                waiting.discard(self._next().request)

    def measure(self, steps: int) -> float:
        """Decode `steps` tokens for each request, return tokens per second of the whole batch."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._chunks.get_nowait()
        with self.server.thawed():
            self._next_of_first()  # was on its way when the server froze, or has waited for it
            start = self._next_of_first()
            while (last := self._next_of_first()).tokens < start.tokens + steps:
                continue
        return self._batch * (last.tokens - start.tokens) / (last.seconds - start.seconds)

    def end(self) -> None:
        with self.server.thawed():
            self.server.abort()

    def _next_of_first(self) -> Chunk:
        """The requests of a batch advance together: one of them tells for all."""
        while (chunk := self._next()).request != 0:
            continue
        return chunk

    def _next(self) -> Chunk:
        return self._chunks.get(timeout=1800)


class Bench:
    """Measures cells on a pair of servers, and writes the records."""

    def __init__(self, baseline: Server, freekv: Server, writer: RecordWriter, args: argparse.Namespace) -> None:
        self.baseline, self.freekv, self.writer, self.args = baseline, freekv, writer, args

    def run(self, cell: Cell) -> float:
        """Measure one cell, return the median ratio of decode throughput."""
        prompts = cell.prompts(self.args.distinct)
        if cell.batch == self.args.batches[0]:
            self._time_to_first_token("cold_first_token", cell, prompts[0])
            self._time_to_first_token("cached_first_token", cell, prompts[0][:-PAGE_SIZE] + [0] * PAGE_SIZE)
        before = self._counters()
        baseline, freekv, ratios = self._decode(prompts)
        ratio = statistics.median(ratios)
        medians = statistics.median(freekv), statistics.median(baseline)
        self._write("decode_throughput", medians[0], "tokens/s", cell, medians[1], ratio)
        self._write("round_ratio_highest", max(ratios), "ratio", cell, min(ratios), against="lowest")
        print(
            f"  decode {medians[1]:.1f} -> {medians[0]:.1f} tokens/s, ratio {ratio:.2f}"
            f" ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        if before is not None:
            self._write_recall(cell, before, self._counters())
        return ratio

    def _time_to_first_token(self, metric: str, cell: Cell, prompt: list[int]) -> None:
        seconds = []
        for server in (self.freekv, self.baseline):
            with server.thawed():
                seconds.append(server.first_token_seconds(prompt))
        self._write(metric, seconds[0], "s", Cell(cell.context, 1), seconds[1])
        print(f"  {metric.replace('_', ' ')} {seconds[1]:.2f} -> {seconds[0]:.2f} s")

    def _decode(self, prompts: list[list[int]]) -> tuple[list[float], list[float], list[float]]:
        """Tokens per second in each round, of the baseline and of FreeKV, and their ratios."""
        steps, rounds = self.args.steps, self.args.rounds
        # Each turn also skips up to three messages, and one round warms up.
        max_new_tokens = (rounds + 2) * (steps + 4 * STREAM_INTERVAL)
        turns = [Turns(server, prompts, max_new_tokens) for server in (self.baseline, self.freekv)]
        for turn in turns:
            turn.measure(STREAM_INTERVAL)
        speeds = [[turn.measure(steps) for turn in turns] for _ in range(rounds)]
        for turn in turns:
            turn.end()
        baseline, freekv = (list(column) for column in zip(*speeds, strict=True))
        return baseline, freekv, [new / old for old, new in speeds]

    def _counters(self) -> dict | None:
        with self.freekv.thawed():
            return self.freekv.freekv()

    def _write_recall(self, cell: Cell, before: dict, after: dict) -> None:
        """What retrieval did meanwhile, first selection after the prefill included."""
        numbers = retrieval_numbers(before, after)
        for metric in _RECALL:
            self._write(metric, *numbers[metric], cell)
        recalled, hits, corrected, absent = (numbers[metric][0] for metric in _RECALL)
        print(
            f"  recalled {recalled:,.0f} bytes per token, hits {hits:.3f}, "
            f"corrected rows {corrected:.3f}, absent pages {absent}"
        )

    def write_memory(self, context: int) -> None:
        """Device bytes of one request of this length: both windows and the summaries, against its complete KV."""
        with self.freekv.thawed():
            ours, full = device_bytes_per_request(self.freekv.freekv(), context)
        self._write("device_memory_per_request", ours, "bytes", Cell(context, 1), full)
        print(f"device memory of a request of {context} tokens: {full:,.0f} -> {ours:,.0f} bytes, {ours / full:.3f}")

    def _write(
        self,
        metric: str,
        value: float,
        unit: str,
        cell: Cell,
        baseline_value: float | None = None,
        ratio: float | None = None,
        against: str = BASELINE,
    ) -> None:
        params = {"layers": self.args.layers, "context": cell.context, "batch": cell.batch}
        params["budget"] = self.args.budget
        params |= {"prompts": "distinct"} if self.args.distinct else {}
        baseline = against if baseline_value is not None else None
        self.writer.write(metric, value, unit, params, baseline=baseline, baseline_value=baseline_value, ratio=ratio)


def start_servers(args: argparse.Namespace, stack: contextlib.ExitStack) -> Iterator[Server]:
    """Start plain SGLang, then FreeKV, each frozen when it is ready; `stack` ends them."""
    model = BUILD / "model"
    TinyModel(layers=args.layers).write(model)
    tokens = sum(args.contexts) * (max(args.batches) if args.distinct else 1) + 32768
    common = f"--model-path {model} --page-size {PAGE_SIZE} --dtype bfloat16 --device cpu --sampling-backend pytorch"
    common += f" --max-running-requests {max(args.batches) + SPARE_REQUESTS} --max-total-tokens {tokens}"
    common += f" --chunked-prefill-size {args.chunk} --stream-interval {STREAM_INTERVAL}"
    common += " --mem-fraction-static 0.8"  # the default leaves nothing beside the buffers of a large chunk
    common += " --sleep-on-idle --watchdog-timeout 100000"  # a frozen server is not a hung one
    flags = common.split()
    retrieval = ["--kv-retrieval", "freekv", "--freekv-budget", str(args.budget)]
    # Room for the windows of the largest batch, and little more: what is not in a window is recalled.
    retrieval += ["--freekv-device-blocks-memory", str(args.device_blocks_memory), *args.freekv_flags]
    second = [] if args.baseline_only else retrieval
    for name, more in (("plain", []), ("freekv", second)):
        print(f"starting {name} ...", flush=True)
        server = Server(name, flags + more, BUILD / f"{name}.log")
        stack.callback(server.stop)
        server.freeze()
        yield server


def run(args: argparse.Namespace) -> None:
    cells = [Cell(context, batch) for context in sorted(args.contexts) for batch in args.batches]
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # the servers end, too
    with contextlib.ExitStack() as stack:
        bench = Bench(*start_servers(args, stack), RecordWriter("bench_cpu", args.out), args)
        begin, done, ratios = time.monotonic(), 0.0, {}
        for number, cell in enumerate(cells, start=1):
            eta = f", about {_left(begin, done, cells):.0f} s left" if done else ""
            print(
                f"[{number}/{len(cells)}] {cell.context} tokens, batch {cell.batch}"
                f" ({time.monotonic() - start:.0f} s{eta})",
                flush=True,
            )
            ratios[cell] = bench.run(cell)
            done += cell.cost
        if not args.baseline_only:
            bench.write_memory(max(args.contexts))
        _report_goals(ratios)


def _left(begin: float, done: float, cells: list[Cell]) -> float:
    return (time.monotonic() - begin) / done * (sum(cell.cost for cell in cells) - done)


def _report_goals(ratios: dict[Cell, float]) -> None:
    for cell, ratio in ratios.items():
        if goal := GOALS.get((cell.context, cell.batch)):
            verdict = "reached" if ratio >= goal else "MISSED"
            print(f"goal at {cell.context} tokens, batch {cell.batch}: {goal} times, got {ratio:.2f}: {verdict}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768], help="tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="requests")
    parser.add_argument("--layers", type=int, default=2, help="of the model; plain prefill is slow")
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each server per cell")
    parser.add_argument("--steps", type=int, default=32, help=f"decode steps per turn, a multiple of {STREAM_INTERVAL}")
    parser.add_argument("--chunk", type=int, default=32768, help="tokens per prefill chunk")
    parser.add_argument("--device-blocks-memory", type=float, default=0.1, help="GiB, FreeKV's resident KV")
    parser.add_argument("--distinct", action="store_true", help="a document of its own for each request")
    parser.add_argument("--quick", action="store_true", help="1K and 4K tokens, two rounds; records go to build/")
    parser.add_argument("--baseline-only", action="store_true", help="plain SGLang twice: the ratio must be near 1")
    parser.add_argument("--out", type=Path, help="file of the records")
    parser.add_argument("freekv_flags", nargs="*", help="after --: more flags for the FreeKV server")
    args = parser.parse_args()
    if args.quick:
        args.contexts, args.rounds = [1024, 4096], 2
    if args.steps % STREAM_INTERVAL:
        parser.error(f"--steps must be a multiple of {STREAM_INTERVAL}, got {args.steps}")
    is_trial = args.quick or args.baseline_only
    args.out = args.out or (BUILD if is_trial else RESULTS) / "bench_cpu.jsonl"
    return args


if __name__ == "__main__":
    run(parse_args())
