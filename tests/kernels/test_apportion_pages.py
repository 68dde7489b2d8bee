"""Rows get what their attention asks for, and the rows of a request together no more than their budgets: by loops."""

from __future__ import annotations

import math

import pytest
import torch

from freekv_kernels import Half
from tests.support.op_tables import batch_of

HEADS, SINK, RECENT, TIMES, FREE = 3, 1, 2, 3, -7
FIXED = SINK + RECENT
LONG = [40, 33, 700, 12, 8]  # the last is within its budget


def make(impl, num_pages=LONG, budgets=(8, 7, 9, 8, 8), masses=None, spread=2.0, num_listed=None):
    """Shares of the whole attention, of which heads need different numbers of pages; lists if `num_listed` is given."""
    requests = len(num_pages)
    num_columns = num_listed or max(num_pages)
    shares = torch.randn(requests, HEADS, 1, num_columns) * spread * torch.arange(1, HEADS + 1)[:, None, None]
    pages = torch.full((requests * HEADS, num_columns), -1, dtype=torch.int32)
    for row, own in enumerate(pages):
        n = num_pages[row // HEADS]
        middle = sorted((SINK + torch.randperm(n - FIXED)[: num_columns - FIXED]).tolist())
        listed = [*range(SINK), *middle, *range(n - RECENT, n)]
        own[: len(listed)] = torch.tensor(listed)
    shares = shares.flatten(0, 1).masked_fill((pages < 0)[:, None], float("-inf")).log_softmax(-1)
    shares[(pages < 0)[:, None]] = FREE  # of no page, and of more than everything
    no_table = torch.zeros(1, 1, dtype=torch.int64, device=impl.device)
    batch = batch_of(no_table, num_pages, budgets, num_pages_next=num_pages, num_kv_heads=HEADS)
    of_rows = torch.zeros(requests + 2)
    of_rows[1 : requests + 1] = torch.tensor([0.9] * requests if masses is None else masses)
    return shares, batch, of_rows, pages if num_listed else None


def run(impl, shares, batch, masses, pages=None, half=Half.FRONT):
    """The budgets as nested lists, once the copy by row of the request table says the same."""
    out = torch.full((len(batch.rows), HEADS), FREE, device=impl.device)
    of_rows = torch.full((len(masses), HEADS), FREE, device=impl.device)
    before, own = shares.clone(), shares.to(impl.device)
    pages = None if pages is None else pages.to(impl.device)
    impl.ops.apportion_pages(own, batch, half, masses.to(impl.device), SINK, RECENT, TIMES, out, of_rows, pages)
    assert torch.equal(own.cpu(), before)
    assert torch.equal(of_rows[batch.rows], out)
    assert (of_rows == FREE).all(1).sum() == len(masses) - len(batch.rows)
    return out.tolist()


def candidates_of(shares, batch, pages, request):
    """Shares of the pages that each head may select, the largest first."""
    num_pages = int(batch.num_pages[request])
    for head in range(HEADS):
        row = request * HEADS + head
        listed = range(shares.shape[2]) if pages is None else pages[row].tolist()
        own = [float(shares[row, 0, c]) for c, p in enumerate(listed) if SINK <= p < num_pages - RECENT]
        yield sorted(own, reverse=True)


def wanted(own, num_pages, mass, room):
    """Fewest pages that leave out at most 1 - mass."""
    most = min(len(own), TIMES * room, num_pages - FIXED - 1)
    left_out = [sum(math.exp(share) for share in own[count:]) for count in range(len(own) + 1)]
    return min(most, next(count for count in range(1, len(own) + 1) if left_out[count] <= 1 - mass + 1e-7))


def expected(shares, batch, masses, pages=None):
    for request, num_pages in enumerate(batch.num_pages.tolist()):
        budgets, mass = batch.budget_pages[request].tolist(), float(masses[int(batch.rows[request])])
        if num_pages <= budgets[0] or mass == 0:
            yield budgets
            continue
        of_heads = list(candidates_of(shares, batch, pages, request))
        counts = [wanted(own, num_pages, mass, budgets[0] - FIXED) for own in of_heads]
        room = sum(budgets) - HEADS * FIXED
        while sum(counts) > room:  # drop the page with the smallest share
            droppable = [head for head in range(HEADS) if counts[head] > 1]
            counts[min(droppable, key=lambda head: of_heads[head][counts[head] - 1])] -= 1
        yield [FIXED + count for count in counts]


@pytest.mark.parametrize("is_listed", [False, True], ids=["every-page", "listed"])
@pytest.mark.parametrize("mass", [0.3, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(3))
def test_rows_get_what_a_loop_gives_them(impl, seed, mass, is_listed):
    torch.manual_seed(seed)
    inputs = make(impl, masses=[mass] * 5, num_listed=30 if is_listed else None)
    assert run(impl, *inputs) == list(expected(*inputs))


def test_the_cases_of_the_loop_are_all_there(impl):
    """Requests that want less than their budgets, and more; rows that want more than they may have."""
    shares, batch, masses, _ = make(impl, masses=[0.3, 0.99, 0.99, 0.9, 0.9])
    found, budgets = run(impl, shares, batch, masses), batch.budget_pages.tolist()
    assert sum(found[0]) < sum(budgets[0]) and sum(found[1]) == sum(budgets[1])
    assert max(found[1]) > budgets[1][0] and min(found[1]) < budgets[1][0], "unequal"
    one_head = shares.clone()
    one_head[2 * HEADS] = -math.log(shares.shape[2])  # wants all of 700 pages, and the others one
    one_head[2 * HEADS + 1 : 3 * HEADS] = -40.0
    one_head[2 * HEADS + 1 : 3 * HEADS, 0, SINK] = 0.0
    budget = int(batch.budget_pages[2, 0])
    most = FIXED + TIMES * (budget - FIXED)
    assert run(impl, one_head, batch, masses)[2] == [most - 2, FIXED + 1, FIXED + 1], "all that the others leave"
    batch.budget_pages[2, 1] += 5
    assert run(impl, one_head, batch, masses)[2][0] == most


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_no_request_gets_more_than_its_budgets_and_no_row_less_than_one_page(impl, seed, mass):
    torch.manual_seed(10 + seed)
    spread = (0.0, 0.1, 3.0, 30.0)[seed]  # equal shares, and shares that are nothing
    budgets = [[5, 9, 4], [FIXED, 6, 5], [8, 8, 8], [8, 8, 8], [8, 8, 8]]
    inputs = make(impl, budgets=budgets, masses=[mass] * 5, spread=spread)
    found = torch.tensor(run(impl, *inputs))
    batch = inputs[1]
    own, num_pages = batch.budget_pages.cpu(), batch.num_pages.cpu()[:, None]
    assert (found.sum(1) <= own.sum(1)).all()
    if mass == 1 and spread < 30:  # beyond, most pages have no mass that float32 knows
        assert (found.sum(1) == own.sum(1))[:3].all(), "nothing is left where everything is wanted"
    is_over = num_pages > own
    assert (found < num_pages)[is_over].all() and torch.equal(found[~is_over], own[~is_over])
    assert (found >= FIXED + (own > FIXED).long()).all() and (found <= FIXED + TIMES * (own - FIXED))[is_over].all()


def test_a_request_without_a_mass_keeps_its_budgets(impl):
    shares, batch, masses, _ = make(impl, masses=[0.0, 0.9, 0.0, 0.9, 0.9])
    found = run(impl, shares, batch, masses)
    assert found[0] == [8] * HEADS and found[2] == [9] * HEADS and found[1] != [7] * HEADS


def test_a_budget_of_sink_and_recent_selects_nothing(impl):
    shares, batch, masses, _ = make(impl, budgets=[FIXED] * 5)
    assert run(impl, shares, batch, masses) == [[FIXED] * HEADS] * 5


def test_the_length_is_that_of_the_half(impl):
    """One page more in the next step, which makes the last request one over its budget."""
    shares, batch, masses, _ = make(impl)
    batch = batch._replace(num_pages_next=batch.num_pages + 1)
    front, back = (run(impl, shares, batch, masses, half=half) for half in (Half.FRONT, Half.BACK))
    assert front[-1] == [8] * HEADS and back[-1] != front[-1] and max(back[-1]) <= 8
    assert back == run(impl, shares, batch, masses, half=Half.BOTH)


def test_padding_keeps_the_budgets_that_it_has(impl):
    shares, batch, masses, _ = make(impl)
    batch = batch._replace(num_pages=batch.num_pages * 0)
    assert run(impl, shares, batch, masses) == batch.budget_pages.tolist()
