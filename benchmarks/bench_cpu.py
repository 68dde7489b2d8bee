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
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records import RESULTS, ROOT, RecordWriter
from benchmarks.server import Chunk, Server
from sglang_freekv.tiny_model import TinyModel

BASELINE = "plain SGLang"
PAGE_SIZE = 32
BUILD = ROOT / "build" / "bench_cpu"
# Streaming costs the client's and the tokenizer's share of two cores; messages of eight tokens make it small.
STREAM_INTERVAL = 8
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
        with thawed(server):
            self._chunks = server.decode(prompts, max_new_tokens)
            waiting = set(range(self._batch))
            while waiting:  # all of them are decoding from here on
                waiting.discard(self._next().request)

    def measure(self, steps: int) -> float:
        """Decode `steps` tokens for each request, return tokens per second of the whole batch."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._chunks.get_nowait()
        with thawed(self.server):
            self._next_of_first()  # was on its way when the server froze, or has waited for it
            start = self._next_of_first()
            while (last := self._next_of_first()).tokens < start.tokens + steps:
                continue
        return self._batch * (last.tokens - start.tokens) / (last.seconds - start.seconds)

    def end(self) -> None:
        with thawed(self.server):
            self.server.abort()

    def _next_of_first(self) -> Chunk:
        """The requests of a batch advance together: one of them tells for all."""
        while (chunk := self._next()).request != 0:
            continue
        return chunk

    def _next(self) -> Chunk:
        return self._chunks.get(timeout=1800)


@contextlib.contextmanager
def thawed(server: Server) -> Iterator[None]:
    server.thaw()
    yield
    server.freeze()


class Bench:
    """Measures cells on a pair of servers, and writes the records."""

    def __init__(self, baseline: Server, freekv: Server, writer: RecordWriter, args: argparse.Namespace) -> None:
        self.baseline, self.freekv, self.writer, self.args = baseline, freekv, writer, args
        self._read: set[int] = set()  # context lengths whose documents both servers have seen

    def run(self, cell: Cell) -> float:
        """Measure one cell, return the median ratio of decode throughput."""
        prompts = cell.prompts(self.args.distinct)
        self._first_tokens(cell, prompts)
        before = self._counters()
        ratios, speeds = self._decode(prompts)
        ratio = statistics.median(ratios)
        median = [statistics.median(s) for s in zip(*speeds, strict=True)]
        self._write("decode_throughput", median[1], "tokens/s", cell, median[0], ratio)
        spread = {"baseline": "lowest", "baseline_value": min(ratios)}
        self.writer.write("round_ratio_highest", max(ratios), "ratio", self._params(cell), **spread)
        self._write_counters(cell, before, self._counters())
        self._say(f"decode: {median[0]:.1f} -> {median[1]:.1f} tokens/s, ratio {ratio:.2f}", ratios)
        return ratio
