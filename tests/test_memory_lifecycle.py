"""Random lives of requests, and pages that change their owner.

All keys and values are random numbers, so any value that outlives its request, is read before it is written
or comes from another page differs from what the reference expects.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from freekv_kernels import Count
from random_traces import make_trace
from sglang_freekv.audit import audit_blocks, audit_summaries, audit_windows
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.geometry import Geometry
from simulated_requests import PAGE, Request, SimulatedEngine
from small_engine import two_requests

GEOMETRY = Geometry(num_layers=1, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
CONFIG = FreeKVConfig(
    budget_tokens=4 * PAGE,
    max_budget_tokens=5 * PAGE,
    sink_tokens=PAGE,
    recent_tokens=PAGE,
    arena_tokens=4 * PAGE,
    key_bits=1,
)
MAX_TOKENS = 20 * PAGE
MAX_REQUESTS = 4
NUM_PAGES = 64  # fewer than four requests and the tree can hold, so pages are reused all the time


class RandomTraffic:
    """Requests start, are prefilled in chunks, decode, finish, are aborted, retracted and de-duplicated."""

    def __init__(self, seed: int) -> None:
        self.engine = SimulatedEngine(GEOMETRY, CONFIG, max_requests=MAX_REQUESTS, num_pages=NUM_PAGES)
        self.random = random.Random(seed)
        self.tree: list[Request] = []  # finished requests whose pages are kept for prefix hits
        self.actions: Counter[str] = Counter()
        self.reused_pages = 0
        self._ever_used: set[int] = set()

    def act(self) -> None:
        """One random action, where it is possible."""
        weights = {
            self.decode: 50,
            self.prefill: 20,
            self.start: 14,
            self.finish: 4,
            self.abort: 3,
            self.retract: 4,
            self.deduplicate: 5,
        }
        action = self.random.choices(list(weights), list(weights.values()))[0]
        free = set(self.engine.free_pages)
        if action():
            self.actions[action.__name__] += 1
        taken = free - set(self.engine.free_pages)
        self.reused_pages += len(taken & self._ever_used)
        self._ever_used |= taken

    @property
    def decoding(self) -> list[Request]:
        return [request for request in self.engine.requests if request.is_decoding]

    @property
    def in_prefill(self) -> list[Request]:
        return [request for request in self.engine.requests if not request.is_decoding]

    def start(self) -> bool:
        """Half of the requests continue a prefix that runs or that the tree keeps."""
        if not self.engine.free_rows:
            return False
        prompt_tokens = self.random.randint(1, MAX_TOKENS - 40)
        budget_tokens = self.random.choice([None, 3 * PAGE, 5 * PAGE])
        donors = [request for request in [*self.decoding, *self.tree] if request.length >= PAGE]
        prefix, prefix_tokens = None, 0
        if donors and self.random.random() < 0.5:
            prefix = self.random.choice(donors)
            prefix_tokens = self.random.randint(1, prefix.length // PAGE) * PAGE
            prompt_tokens = max(prompt_tokens, prefix_tokens + 1)
        shared = {"prefix": prefix, "prefix_tokens": prefix_tokens}
        trace = make_trace(GEOMETRY, MAX_TOKENS + PAGE, self.random.getrandbits(32), **self._trace_of(shared))
        self.engine.start(trace, prompt_tokens, budget_tokens=budget_tokens, **shared)
        return True

    def _trace_of(self, shared: dict) -> dict:
        prefix = shared["prefix"]
        return shared | {"prefix": prefix.trace} if prefix else shared

    def prefill(self) -> bool:
        """A chunk of some of the prompts; mostly one that ends inside a page."""
        requests = [request for request in self.in_prefill if self.random.random() < 0.7]
        chunks = []
        for request in requests:
            left = request.prompt_tokens - request.length
            num_tokens = left if self.random.random() < 0.4 else self.random.randint(1, left)
            if not self._make_room(sum(n for _, n in chunks) + num_tokens + len(requests) * PAGE):
                break
            chunks.append((request, num_tokens))
        if chunks:
            self.engine.prefill(chunks)
        return bool(chunks)

    def decode(self) -> bool:
        """A step of all requests; those at their end finish, and some are retracted if pages run out."""
        for request in self.decoding:
            if request.length == len(request.trace.q[0]):
                self._finish(request)
        while self.decoding and not self._make_room(len(self.decoding) * PAGE):
            self._retract(self.decoding[-1])
        if not self.decoding:
            return False
        self.engine.decode()
        audit_blocks(self.engine.memory)
        audit_summaries(self.engine.memory, torch.tensor([page for r in self.decoding for page in r.pages]))
        audit_windows(self.engine.retrieval)
        return True

    def finish(self) -> bool:
        return self._with_one_of(self.decoding, self._finish)

    def abort(self) -> bool:
        return self._with_one_of(self.engine.requests, self.engine.leave)

    def retract(self) -> bool:
        return self._with_one_of(self.decoding, self._retract)

    def deduplicate(self) -> bool:
        """Give a running request the tree's pages of the same tokens."""
        both = itertools.product(self.decoding, self.tree)
        pairs = [(request, kept) for request, kept in both if kept.trace is request.trace]
        for request, kept in pairs:
            num_pages = min(request.length, kept.length) // PAGE
            self.engine.replace_pages(request, kept.pages[:num_pages])
        return bool(pairs)

    def _with_one_of(self, requests: list[Request], action: Callable[[Request], None]) -> bool:
        if requests:
            action(self.random.choice(requests))
        return bool(requests)

    def _finish(self, request: Request) -> None:
        self.engine.hold(request.pages)
        self.tree.append(request)
        self.engine.leave(request)

    def _retract(self, request: Request) -> None:
        """The request starts again from its tokens, on a hit of what it left in the tree or from nothing."""
        keeps_pages = self.random.random() < 0.5
        (self._finish if keeps_pages else self.engine.leave)(request)
        self.engine.start(request.trace, request.length)

    def _make_room(self, num_tokens: int) -> bool:
        """Evict from the tree, oldest first, until some tokens fit."""
        while len(self.engine.free_pages) * PAGE < num_tokens and self.tree:
            self.engine.release(self.tree.pop(0).pages)
        return len(self.engine.free_pages) * PAGE >= num_tokens


@pytest.mark.parametrize("seed", [0, 1])
def test_random_lives_of_requests_keep_every_invariant(seed: int) -> None:
    traffic = RandomTraffic(seed)
    for _ in range(1000):
        traffic.act()
    counters = traffic.engine.memory.counters
    assert min(traffic.actions[name] for name in ("start", "prefill", "finish", "abort", "retract")) > 10
    assert traffic.actions["decode"] > 300
    assert traffic.actions["deduplicate"] > 3
    assert traffic.reused_pages > 200
    assert min(counters[Count.MISSES], counters[Count.DEMAND_MISSES], traffic.engine.corrected, traffic.engine.kept) > 0

    for request in list(traffic.engine.requests):
        traffic.engine.leave(request)
    for request in traffic.tree:
        traffic.engine.release(request.pages)
    assert sorted(traffic.engine.free_pages) == list(range(1, NUM_PAGES))


@pytest.fixture
def engine() -> SimulatedEngine:
    return two_requests(GEOMETRY, CONFIG)


def test_a_page_that_changes_owner_forgets_its_blocks_and_only_its_own(engine: SimulatedEngine) -> None:
    first, second = engine.requests
    table = engine.memory.blocks.tables.table
    assert (table[0, first.pages + second.pages] >= 0).all()
    kept = table[0, second.pages].clone()
    engine.forget_blocks(first.pages)
    assert (table[0, first.pages] == -1).all()
    owner = engine.memory.blocks.owner(0)
    assert not torch.isin(owner // GEOMETRY.num_kv_heads, torch.tensor(first.pages)).any()
    assert table[0, second.pages].equal(kept)
    engine.memory.check_integrity()


def test_a_request_on_reused_pages_sees_only_its_own_tokens(engine: SimulatedEngine) -> None:
    old = engine.requests[0]
    engine.leave(old)
    newcomer = engine.start(make_trace(GEOMETRY, 10 * PAGE, seed=9), 9 * PAGE)
    engine.prefill([(newcomer, 5 * PAGE + 1)])
    assert set(newcomer.pages) < set(old.pages)
    audit_blocks(engine.memory)
    engine.prefill_whole(newcomer)
    for _ in range(PAGE):
        engine.decode()
        audit_blocks(engine.memory)
