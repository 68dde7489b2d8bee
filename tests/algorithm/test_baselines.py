"""The baselines: each chooses what its paper says, and keeps nothing of a request that has left."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain, pairwise

import pytest
import torch

from freekv_kernels import Count, Half
from sglang_freekv.algorithm.audit import audit_blocks, audit_index, audit_windows
from sglang_freekv.algorithm.baselines.one_time import OneTimeSelector
from sglang_freekv.algorithm.baselines.r_kv import redundancies
from sglang_freekv.config import BASELINES, FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from tests.support.random_traces import Trace, make_trace
from tests.support.reference_checks import Request, WithoutWindows, window_of
from tests.support.simulated_requests import SimulatedEngine

PAGE = 16
GEOMETRY = Geometry(num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, page_size=PAGE)
GROUP = 2
EVICTING = ("r-kv", "corm")
BUDGET = 5  # pages
Windows = list[list[list[int]]]  # by layer and KV head


def make_engine(selector: str, **settings: object) -> SimulatedEngine:
    defaults = {"budget_tokens": BUDGET * PAGE, "max_budget_tokens": 8 * PAGE, "arena_tokens": 4 * PAGE, "tau": -1.0}
    sizes = {"sink_tokens": PAGE, "recent_tokens": PAGE, "page_size": PAGE}
    engine = SimulatedEngine(GEOMETRY, FreeKVConfig(selector=selector, **(defaults | sizes | settings)))
    engine.checks = WithoutWindows(engine.memory, engine.rule)
    return engine


def enter(engine: SimulatedEngine, prompt_tokens: int, trace: Trace | int = 0, **admission: object) -> Request:
    """A request whose prompt is prefilled; a number is the seed of its trace."""
    if isinstance(trace, int):
        trace = make_trace(GEOMETRY, 20 * PAGE, trace)
    request = engine.start(trace, prompt_tokens, **admission)
    engine.prefill_whole(request)
    return request


def decode(engine: SimulatedEngine, request: Request, num_tokens: int) -> list[Windows]:
    """What a request reads in each of its next steps, audited."""
    found = []
    for _ in range(num_tokens):
        engine.decode()
        audit_windows(engine.decoder)
        found.append([window_of(engine.front(layer), request) for layer in range(GEOMETRY.num_layers)])
    audit_blocks(engine.memory)
    audit_index(engine.memory, torch.tensor(request.pages), request.groups)
    assert engine.memory.counters[Count.ABSENT_PAGES] == 0
    return found


def selected(window: list[int]) -> list[int]:
    return window[1:-1]


class TestStreamingLLM:
    def test_a_window_is_the_sink_and_the_latest_pages_at_any_budget(self):
        engine = make_engine("streaming-llm")
        budgets = {enter(engine, 9 * PAGE - 3, seed, budget_tokens=n * PAGE): n for seed, n in enumerate((3, 5, 8))}
        for _ in range(3 * PAGE):
            engine.decode()
            for request, budget in budgets.items():
                num_pages = len(request.pages)
                expected = [0, *range(num_pages - budget + 1, num_pages)]
                windows = (window_of(engine.front(layer), request) for layer in range(GEOMETRY.num_layers))
                assert all(window == expected for of_layer in windows for window in of_layer)

    def test_nothing_is_recalled_as_what_was_just_written_is_resident(self):
        engine = make_engine("streaming-llm")
        decode(engine, enter(engine, 9 * PAGE - 3), 2 * PAGE)
        assert engine.memory.counters[Count.ROWS] > 0 and engine.memory.counters[Count.RECALLS] == 0


class TestOneTime:
    def expected(self, engine: SimulatedEngine, request: Request, num_queries: int) -> Windows:
        """The pages that the prompt's last queries attend to most, by loops over everything."""
        trace, length = request.trace, request.prompt_tokens
        candidates = range(1, math.ceil((length + 1) / PAGE) - 1)
        found = []
        for layer in range(GEOMETRY.num_layers):
            found.append([])
            for head in range(GEOMETRY.num_kv_heads):
                share = dict.fromkeys(candidates, 0.0)
                for last in range(length - num_queries, length):
                    for q in trace.q[layer, last, head * GROUP : (head + 1) * GROUP].double():
                        weights = (engine.scale * trace.k[layer, : last + 1, head].double() @ q).softmax(0)
                        for page in candidates:
                            share[page] += float(weights[page * PAGE : (page + 1) * PAGE].sum())
                found[-1].append(sorted(sorted(candidates, key=share.get)[-(BUDGET - 2) :]))
        return found

    @pytest.mark.parametrize("chunk", [9 * PAGE, OneTimeSelector.num_observed, 5, 1])
    def test_pages_are_chosen_by_the_last_queries_of_the_last_chunk_and_never_again(self, chunk):
        engine = make_engine("one-time")
        request = engine.start(make_trace(GEOMETRY, 20 * PAGE, 7), 9 * PAGE - 3)
        engine.prefill([(request, request.prompt_tokens - min(chunk, 8 * PAGE))])
        engine.prefill_whole(request)
        expected = self.expected(engine, request, min(chunk, OneTimeSelector.num_observed))
        for windows in decode(engine, request, 4 * PAGE):
            assert [[selected(window) for window in of_layer] for of_layer in windows] == expected

    def test_a_prefix_hit_has_no_queries(self):
        engine = make_engine("one-time")
        first = enter(engine, 9 * PAGE - 3, trace := make_trace(GEOMETRY, 20 * PAGE, 3))
        second = enter(engine, 9 * PAGE - 3, trace, prefix=first, prefix_tokens=8 * PAGE)
        for request, num_queries in {first: 32, second: PAGE - 3}.items():
            expected = self.expected(engine, request, num_queries)
            (windows,) = decode(engine, request, 1)
            assert [[selected(window) for window in of_layer] for of_layer in windows] == expected

    def test_where_the_prompt_leaves_room_the_latest_pages_fill_it(self):
        engine = make_engine("one-time")
        request = enter(engine, 3 * PAGE - 3)  # of page 2 as much as is there is recent
        *_, windows = decode(engine, request, 8 * PAGE)
        num_pages = len(request.pages)
        assert all(window == [0, 1, *range(num_pages - 3, num_pages)] for of_layer in windows for window in of_layer)


@pytest.mark.parametrize("selector", EVICTING)
class TestEviction:
    @pytest.mark.parametrize("prompt_pages", [2, 9])
    def test_a_page_that_left_the_window_never_comes_back_and_leaves_when_one_is_opened(self, selector, prompt_pages):
        engine = make_engine(selector)
        request = enter(engine, prompt_pages * PAGE - 3)
        enter(engine, 6 * PAGE - 7, 1)  # another, that opens its pages at other times
        steps = decode(engine, request, 7 * PAGE)
        num_left = 0
        for before, after in pairwise(steps):
            for window, then in zip(chain(*before), chain(*after), strict=True):
                has_opened = then[-1] > window[-1]
                left, come = set(window) - set(then), set(then) - set(window)
                assert come == ({then[-1]} if has_opened else set())
                assert len(left) == (has_opened and len(window) == BUDGET)
                num_left += len(left)
        assert num_left > 0

    def test_correction_changes_nothing_as_there_is_nothing_to_choose_from(self, selector):
        steps = []
        for tau in (-1.0, 2.0):
            engine = make_engine(selector, tau=tau)
            steps.append(decode(engine, enter(engine, 9 * PAGE - 3), 3 * PAGE))
        assert engine.memory.counters[Count.FLAGGED_ROWS] == engine.memory.counters[Count.ROWS] > 0
        assert steps[0] == steps[1]


def survivors(
    selector: str, directions: list[int], asked: list[int], prompt_channel: int = 0, loud: int | None = None
) -> list[int]:
    """Selected pages after the first eviction, of a request whose queries and keys are single channels.

    Parameters
    ----------
    directions : list of int
        Channel of the keys of each page.
    asked : list of int
        Channel of the query of each of the eight steps before; -1: none, so that all tokens get the same attention.
    prompt_channel : int
        Of the prompt's queries.
    loud : int, optional
        Page whose keys are twice as long.
    """
    prompt_tokens, trace = BUDGET * PAGE - 8, make_trace(GEOMETRY, 8 * PAGE, 0)
    k, q = torch.zeros_like(trace.k), torch.full_like(trace.q, 1e-6)
    for page, channel in enumerate(directions):
        k[:, page * PAGE : (page + 1) * PAGE, :, channel] = 2 if page == loud else 1
    for position, channel in enumerate([prompt_channel] * prompt_tokens + asked):
        if channel >= 0:
            q[:, position, :, channel] = 100
    engine = make_engine(selector)
    request = enter(engine, prompt_tokens, replace(trace, k=k, q=q))
    windows = decode(engine, request, 9)[-1]
    (window,) = {tuple(window) for of_layer in windows for window in of_layer}
    return selected(list(window))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([1, 3, 2, 4, 0, 0, 0, 0], [2, 3, 4]),
        ([2, 1, 4, 3, 0, 0, 0, 0], [1, 3, 4]),
        ([3, 4, 1, 2, 1, 4, 0, 3], [1, 3, 4]),
        ([4, 2, 1, 0, 0, 0, 0, 0], [1, 2, 4]),  # nobody asked for page 3
        ([3, 0, 0, 0, 0, 0, 0, 0], [2, 3, 4]),  # of those that nobody asked for, the oldest goes
        ([0, 0, 0, 0, 0, 0, 0, 3], [2, 3, 4]),  # by the query that the page goes after, too
    ],
)
def test_corm_evicts_the_page_whose_last_fair_share_is_the_longest_ago(asked, expected):
    assert survivors("corm", [0, 1, 2, 3, 4], asked) == expected


def test_corm_counts_the_queries_of_the_prompt_as_well():
    assert survivors("corm", [0, 1, 2, 3, 4], [4, 3, 2, 0, 0, 0, 0, 0], prompt_channel=1) == [2, 3, 4]
    assert survivors("corm", [0, 1, 2, 3, 4], [4, 3, 0, 0, 0, 0, 0, 0], prompt_channel=1) == [1, 3, 4]


@pytest.mark.parametrize(
    ("directions", "asked", "loud", "expected"),
    [
        ([0, 1, 2, 1, 1], -1, None, [2, 3, 4]),  # pages 1, 3 and 4 are alike: the oldest goes
        ([0, 1, 2, 2, 2], -1, None, [1, 3, 4]),
        ([0, 1, 2, 2, 2], 1, None, [1, 3, 4]),  # attention to another page does not change that
        ([0, 1, 1, 1, 4], -1, 1, [2, 3, 4]),  # nor do longer keys
        ([0, 1, 1, 1, 4], 1, 1, [1, 3, 4]),  # what has all the attention stays, though it repeats others
    ],
)
def test_r_kv_evicts_what_repeats_others_unless_it_is_attended_to(directions, asked, loud, expected):
    assert survivors("r-kv", directions, [asked] * 8, prompt_channel=asked, loud=loud) == expected


def test_redundancy_is_the_softmax_of_mean_cosines_without_the_last_look_alike():
    keys, is_valid = torch.randn(3, 9, 16).cumsum(1), torch.rand(3, 9) < 0.8
    found = redundancies(keys, is_valid)
    for row in range(3):
        valid = is_valid[row].nonzero().flatten().tolist()
        cosine = torch.zeros(9, 9)
        for i in valid:
            for j in valid:
                cosine[i, j] = torch.cosine_similarity(keys[row, i], keys[row, j], dim=0) if i != j else 0
        assert (cosine > 0.5).any()
        for i in valid:
            alike = [j for j in valid if cosine[i, j] > 0.5]
            cosine[i, max(alike, default=0)] = 0
        expected = (cosine.sum(0)[valid] / len(valid)).softmax(0)
        torch.testing.assert_close(found[row, valid], expected)
        assert found[row, ~is_valid[row]].eq(0).all()


class TestArkVale:
    def scores(self, engine: SimulatedEngine, request: Request) -> torch.Tensor:
        """Of layer 1, ``[num_kv_heads, group_size, full pages]``, by the latest query."""
        batch, layer = engine.decoder.last_plan.batch, engine.memory.layers[1]
        scores = engine.decoder.selectors[layer.kind].score(layer, batch, Half.BACK, engine.scale).values
        return scores.unflatten(0, (-1, GEOMETRY.num_kv_heads))[0, :, :, : request.length // PAGE]

    def test_a_page_scores_the_largest_logit_of_the_ball_around_its_mean_key(self):
        engine = make_engine("arkvale", tau=2.0)
        request = enter(engine, 9 * PAGE - 3)
        decode(engine, request, PAGE)
        scores = self.scores(engine, request)
        q = request.trace.q[1, request.length - 1].double()
        for page in range(request.length // PAGE):
            for qo_head in range(GEOMETRY.num_qo_heads):
                keys = request.trace.k[1, page * PAGE : (page + 1) * PAGE, qo_head // GROUP].double()
                centre = keys.mean(0)
                radius = max(math.dist(key, centre) for key in keys)
                farthest = centre + radius * q[qo_head] / q[qo_head].norm()  # of the ball, in the query's direction
                score = scores[qo_head // GROUP, qo_head % GROUP, page].item()
                assert score == pytest.approx(float(farthest @ q[qo_head]), rel=1e-5, abs=1e-5)
                assert score >= float((keys @ q[qo_head]).max()) - 1e-5

    def test_a_page_comes_back_when_it_scores_best_again(self):
        engine = make_engine("arkvale", tau=2.0)
        steps = decode(engine, enter(engine, 9 * PAGE - 3), 2 * PAGE)
        windows = [set(window) for (window, _), _ in steps]
        gone = [before - after for before, after in pairwise(windows)]
        assert any(page in later for step, pages in enumerate(gone) for page in pages for later in windows[step + 2 :])

    @pytest.mark.parametrize("wrong", ["centres", "radii"])
    def test_the_audit_finds_a_wrong_ball(self, wrong):
        engine = make_engine("arkvale")
        request = enter(engine, 9 * PAGE - 3)
        pages = torch.tensor(request.pages)
        audit_index(engine.memory, pages, request.groups)
        getattr(engine.memory.index, wrong)[1, request.pages[2], 1] *= 1.01
        with pytest.raises(RuntimeError, match=f"layer 1: wrong ball of host page {request.pages[2]}"):
            audit_index(engine.memory, pages, request.groups)


@pytest.mark.parametrize("selector", BASELINES)
class TestRows:
    def test_a_row_keeps_nothing_of_its_former_request(self, selector):
        engine, anew = make_engine(selector), make_engine(selector)
        former = enter(engine, 12 * PAGE - 5, 1)
        decode(engine, former, 2 * PAGE)
        engine.leave(former)
        request, alone = enter(engine, 9 * PAGE - 3), enter(anew, 9 * PAGE - 3)
        assert request.row == former.row
        assert decode(engine, request, 3 * PAGE) == decode(anew, alone, 3 * PAGE)

    def test_a_retracted_request_goes_on_as_a_new_one_with_its_tokens_as_prompt(self, selector):
        engine, anew = make_engine(selector), make_engine(selector)
        trace = make_trace(GEOMETRY, 20 * PAGE, 4)
        retracted = enter(engine, 9 * PAGE - 3, trace)
        decode(engine, retracted, 2 * PAGE)
        engine.hold(retracted.pages[:9])  # as the tree does
        engine.leave(retracted)
        again = enter(engine, retracted.length, trace, prefix=retracted, prefix_tokens=9 * PAGE)
        alone = anew.start(trace, retracted.length)
        anew.prefill([(alone, 9 * PAGE)])
        anew.prefill_whole(alone)
        assert decode(engine, again, 2 * PAGE) == decode(anew, alone, 2 * PAGE)

    def test_requests_beside_it_change_nothing(self, selector):
        engine, quiet = make_engine(selector), make_engine(selector)
        request, alone = engine.start(trace := make_trace(GEOMETRY, 20 * PAGE, 5), 9 * PAGE - 3), None
        other = engine.start(make_trace(GEOMETRY, 20 * PAGE, 6), 2 * PAGE)
        engine.prefill_whole(other, request)
        alone = enter(quiet, 9 * PAGE - 3, trace)
        together = decode(engine, request, PAGE)
        engine.leave(other)
        enter(engine, 8 * PAGE, 8)
        assert together + decode(engine, request, PAGE) == decode(quiet, alone, 2 * PAGE)
