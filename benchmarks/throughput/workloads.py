"""The workloads, as data. A new one is a line in `FULL` or `QUICK`; all lengths are tokens.

`FULL` takes most of an hour on two CPU cores and `QUICK` some minutes, mainly because plain SGLang's attention on a CPU
reads every prompt in full, time growing with the square of its length, whether its prefix is cached or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TRAFFIC, SERIES, MEMORY, ABLATION = "traffic", "series", "memory", "ablation"


@dataclass(frozen=True)
class Workload:
    """Requests that one run of `bench_serving` sends.

    Lengths are drawn log-uniformly between a shortest and a longest. Turns of a conversation all have the longest.
    """

    name: str
    requests: int  # or conversations
    prompt: tuple[int, int]  # of a request's own; in a conversation, of each turn
    output: tuple[int, int]
    prefix: int = 0  # the same in front of every prompt, and in the cache when the measurement begins
    turns: int = 1
    concurrency: int | None = None  # requests at once; None: all of them
    rounds: int = 1  # the servers take turns so often; medians count
    dataset: tuple[str, Path] | None = None  # a file that bench_serving knows by this name, instead of drawn lengths

    @property
    def at_once(self) -> int:
        return min(self.concurrency or self.requests, self.requests)

    @property
    def context(self) -> int:
        """Longest prompt."""
        return self.prefix + self.turns * self.prompt[1] + (self.turns - 1) * self.output[1]

    @property
    def longest(self) -> int:
        """Most tokens of a request, a chat template's included."""
        return self.context + self.output[1] + 32 * self.turns

    @property
    def all_tokens(self) -> int:
        """Most tokens of all requests together, in pages of any size."""
        return self.prefix + self.requests * (self.longest - self.prefix + 64)

    @property
    def least_tokens(self) -> int:
        """Tokens that a cache must hold: of one request, or of all those that share a prefix."""
        return self.all_tokens if self.prefix else self.longest + 64

    def cost(self, is_plain: bool) -> float:
        """Relative time of a round, for the estimate of the time left; plain SGLang reads cached prefixes again."""
        requests, length = self.requests * self.turns, self.context if is_plain else self.context - self.prefix
        prefill = (requests * length**2 + self.prefix**2) / 4096**2 / self.turns
        decode = requests * self.output[1] * (1 + self.context / 8192 * is_plain) / 200
        return 2 + prefill + decode


@dataclass(frozen=True)
class Suite:
    """What one run measures."""

    budget: int  # tokens a request attends to
    tokens: int  # that the cache holds, plain SGLang's on the device and FreeKV's in CPU memory
    running: int  # requests that run at once in traffic and series; more of them wait
    workloads: dict[str, tuple[Workload, ...]]  # by phase


def context(length: int, output: int = 64) -> Workload:
    """Eight requests about one document; with all of them decoding, throughput against context."""
    return Workload("context", 8, (32, 32), (output, output), prefix=length - 32)


def concurrency(at_once: int, length: int = 8192, output: int = 64) -> Workload:
    return Workload("concurrency", at_once, (32, 32), (output, output), prefix=length - 32)


def prefix(length: int, questions: int, at_once: int = 4) -> Workload:
    return Workload("prefix", questions, (32, 128), (32, 64), prefix=length, concurrency=at_once)


FULL = Suite(
    budget=1024,
    tokens=65536,
    running=16,
    workloads={
        TRAFFIC: (
            Workload("short", 64, (64, 512), (64, 128), concurrency=8, rounds=5),
            Workload("random", 48, (128, 16384), (32, 256), concurrency=8),
            prefix(16384, questions=16),
            Workload("turns", 8, (256, 256), (128, 128), turns=6, concurrency=4),
            Workload("generation", 8, (32, 64), (2048, 2048)),
            Workload("burst", 48, (2048, 8192), (32, 64)),
        ),
        SERIES: (
            *(context(length) for length in (2048, 4096, 8192, 16384, 32768)),
            *(concurrency(at_once) for at_once in (1, 2, 4, 8, 16)),
            *(prefix(length, questions=4, at_once=1) for length in (2048, 8192, 16384)),
        ),
        MEMORY: (Workload("memory", 16, (16384, 16384), (64, 64)),),
        ABLATION: (Workload("ablation", 8, (8192, 8192), (64, 64)),),
    },
)

# Few run at once, so that the blocks of their windows are a part of the cache; `documents` are larger than the blocks.
QUICK = Suite(
    budget=512,
    tokens=24576,
    running=8,
    workloads={
        TRAFFIC: (
            Workload("short", 24, (64, 384), (64, 96), concurrency=8, rounds=3),
            prefix(8192, questions=3, at_once=1),
            Workload("turns", 4, (128, 128), (48, 48), turns=3),
            Workload("burst", 32, (1024, 4096), (16, 32)),
        ),
        SERIES: (
            *(context(length, output=32) for length in (2048, 4096, 8192)),
            Workload("documents", 8, (8192, 8192), (64, 64)),
        ),
        MEMORY: (Workload("memory", 16, (4096, 4096), (32, 32)),),
        ABLATION: (Workload("ablation", 4, (4096, 4096), (32, 32)),),
    },
)
