"""No request reads another's KV from its pages, blocks or row: whose values attention sees, on the memory side."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from freekv_kernels import REFERENCE
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from tests.support.random_traces import make_trace
from tests.support.reference_checks import ReferenceChecks, Request
from tests.support.simulated_requests import PAGE, SimulatedEngine

GEOMETRY = Geometry(num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
CONFIG = FreeKVConfig(budget_tokens=4 * PAGE, sink_tokens=PAGE, recent_tokens=PAGE, arena_tokens=4 * PAGE)
_NUM_PAGES = 25  # two requests of the largest kind: every page has many owners
_TOLERANCE = 1e-5  # of a weighted mean of equal values; one token of another owner shifts it by more than 1e-3


class Owners:
    """Requests whose values are all the same number, each its own: any other number in an output is another's."""

    def __init__(self, engine: SimulatedEngine, seed: int) -> None:
        self.engine, self.random = engine, random.Random(seed)
        self.value: dict[Request, float] = {}
        self.owners_of_page: dict[int, set[float]] = {}

    def start(self) -> None:
        number = float(1000 * (len(self.value) + 1))
        prompt_tokens = self.random.randint(1, 10 * PAGE)
        trace = make_trace(GEOMETRY, 12 * PAGE, self.random.getrandbits(32))
        request = self.engine.start(replace(trace, v=torch.full_like(trace.v, number)), prompt_tokens)
        self.value[request] = number
        while not request.is_decoding:
            left = request.prompt_tokens - request.length
            (out,) = self.engine.prefill([(request, self.random.randint(1, left))])
            self._assert_own(request, out)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            for token in self.engine.decode():
                self._assert_own(token.request, torch.stack(token.outputs))

    def leave(self, request: Request) -> None:
        for page in request.pages:
            self.owners_of_page.setdefault(page, set()).add(self.value[request])
        self.engine.leave(request)

    def _assert_own(self, request: Request, out: torch.Tensor) -> None:
        own = self.value[request]
        shown = out.flatten()[(out.flatten() / own - 1).abs().argmax()].item()
        assert abs(shown / own - 1) < _TOLERANCE, f"the owner of {own} is shown {shown}"


def live(owners: Owners, num_owners: int) -> None:
    """Two requests run at a time; the older makes room for the next."""
    for _ in range(num_owners):
        owners.start()
        owners.decode(owners.random.randint(1, PAGE // 2))
        if len(owners.engine.requests) == 2:
            owners.leave(owners.engine.requests[0])


@pytest.mark.parametrize(
    "settings",
    [{}, {"key_bits": 0, "tau": 2.0}, {"dense_layers": (0,), "tau": -1.0}, {"budget_tokens": 16 * PAGE}],
    ids=str,
)
def test_a_page_of_many_owners_shows_each_its_own_values(settings: dict):
    config = replace(CONFIG, max_budget_tokens=None, **settings)
    owners = Owners(SimulatedEngine(GEOMETRY, config, max_requests=2, num_pages=_NUM_PAGES), seed=1)
    live(owners, 8)
    assert max(map(len, owners.owners_of_page.values())) >= 3, "pages were not reused"


class Unchecked(ReferenceChecks):
    """Compares nothing with the reference, so that the values have to show what is wrong."""

    def invariants(self, *_) -> None: ...
    def output(self, *_) -> None: ...
    def windows(self, *_) -> None: ...
    def flags(self, *_) -> tuple[int, int]:
        return 0, 0


def test_the_values_show_a_slot_that_is_not_the_owners():
    """From some step on nothing is written: the new token's slot keeps what the page's earlier owner wrote."""
    is_broken = False

    def append_tokens(*args) -> None:
        if not is_broken:
            REFERENCE.append_tokens(*args)

    ops = REFERENCE._replace(append_tokens=append_tokens)
    engine = SimulatedEngine(GEOMETRY, CONFIG, max_requests=2, num_pages=_NUM_PAGES, ops=ops)
    engine.checks = Unchecked(engine.memory, engine.rule)
    owners = Owners(engine, seed=1)
    live(owners, 8)
    is_broken = True
    with pytest.raises(AssertionError, match=r"the owner of \d+\.0 is shown \d"):
        live(owners, 8)
