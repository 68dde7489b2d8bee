"""The request table: each request has its own budget, however long its row lives."""

from __future__ import annotations

import types

import pytest

from sglang_freekv.config import FreeKVConfig
from sglang_freekv.serving.kv_pool import FreeKVReqToTokenPool
from tests.support.releases import of_release

CONFIG = FreeKVConfig(budget_tokens=256, max_budget_tokens=8192, mass=0.5)


class Req:
    """What the table reads of SGLang's request."""

    def __init__(self, budget: int | None = None, row: int | None = None, mass: float | None = None) -> None:
        of_release.give_row(self, row)
        asked = {"freekv_budget": budget, "freekv_mass": mass}
        custom_params = {name: value for name, value in asked.items() if value is not None}
        self.sampling_params = types.SimpleNamespace(custom_params=custom_params or None)


@pytest.fixture
def admitted() -> list[tuple[int, int, float]]:
    """Rows, budgets and masses as they are admitted."""
    return []


@pytest.fixture
def table(admitted: list[tuple[int, int, float]]) -> FreeKVReqToTokenPool:
    table = FreeKVReqToTokenPool(CONFIG, 4, 1024, "cpu")
    table.memory = types.SimpleNamespace(admit=lambda *request: admitted.append(request))
    return table


def test_a_request_is_admitted_once_with_its_own_budget_or_the_configured_one(table, admitted):
    reqs = [Req(1024, mass=0.9), Req()]
    rows = table.alloc(reqs)
    assert admitted == [(rows[0], 1024, 0.9), (rows[1], 256, 0.5)]
    for req in reqs:
        req.inflight_middle_chunks = 1
    assert table.alloc(reqs) == rows  # with their next chunks
    assert len(admitted) == 2


@pytest.mark.parametrize("budgets", [(1024, 8192), (8192, 1024), (1024, None), (None, 1024)])
def test_each_turn_of_a_session_has_its_own_budget_though_the_row_stays(table, admitted, budgets):
    (row,) = table.alloc([Req(budgets[0])])
    for _ in range(2):  # and with the next chunk of the turn
        (same,) = table.alloc([turn := Req(budgets[1], row)]) if len(admitted) == 1 else table.alloc([turn])
        assert same == row
    assert admitted == [(row, budget or 256, 0.5) for budget in budgets]


def test_a_request_that_is_retracted_is_admitted_again(table, admitted):
    req = Req(1024)
    table.alloc([req])
    table.free(req)
    table.alloc([req])
    assert [budget for _, budget, _ in admitted] == [1024, 1024]


def test_a_row_does_not_keep_its_last_request(table):
    req = Req()
    table.alloc([req])
    del req
    assert len(table._owners) == 0


def test_where_no_row_is_free_nobody_is_admitted(table, admitted):
    assert table.alloc([Req() for _ in range(5)]) is None
    assert admitted == []
