"""A window is sink, best pages, recent: compared with a selection written as a loop."""

import math

import pytest
import torch

from freekv_kernels import select_pages


def expected_window(scores, n, budget, sink, recent, width, pooling):
    """One (request, KV head); scores [group_size, max_pages]."""
    if n <= budget:
        pages = list(range(n))
    else:
        candidates = range(sink, n - recent)

        def pooled(page):
            if pooling == "mean":
                return sum(s[page] for s in scores) / len(scores)
            peaks = [max(s[c] for c in candidates) for s in scores]
            totals = [sum(math.exp(s[c] - m) for c in candidates) for s, m in zip(scores, peaks, strict=True)]
            return sum(math.exp(s[page] - m) / t for s, m, t in zip(scores, peaks, totals, strict=True))

        best = sorted(candidates, key=pooled, reverse=True)[: budget - sink - recent]
        pages = [*range(sink), *sorted(best), *range(n - recent, n)]
    return pages + [-1] * (width - len(pages))


CASES = [  # pages of each request, budgets, sink, recent, width
    pytest.param([9, 20, 31], [8, 8, 8], 2, 3, 8, id="all-over"),
    pytest.param([1, 8, 9], [8, 8, 8], 1, 1, 8, id="one-page-at-and-over-the-budget"),
    pytest.param([30, 30, 5], [6, 10, 10], 2, 2, 12, id="own-budgets"),
    pytest.param([30, 12], [9, 9], 0, 1, 9, id="no-sink"),
    pytest.param([33], [8], 1, 2, 8, id="page-not-opened-yet"),
    pytest.param([10], [9], 1, 1, 40, id="wide-window"),
]


@pytest.mark.parametrize("pooling", ["softmax", "mean"])
@pytest.mark.parametrize("num_pages, budgets, sink, recent, width", CASES)
def test_the_window_equals_the_loop(num_pages, budgets, sink, recent, width, pooling):
    max_pages = min(32, max(num_pages))
    scores = torch.randn(len(num_pages), 2, 3, max_pages, dtype=torch.float32)
    window = select_pages(scores, torch.tensor(num_pages), torch.tensor(budgets), sink, recent, width, pooling)
    assert window.dtype == torch.int32 and window.shape == (len(num_pages), 2, width)
    for b, (n, budget) in enumerate(zip(num_pages, budgets, strict=True)):
        for h in range(2):
            rows = scores[b, h].double().tolist()
            assert window[b, h].tolist() == expected_window(rows, n, budget, sink, recent, width, pooling)


def test_equal_scores_still_give_distinct_pages():
    window = select_pages(torch.zeros(1, 1, 4, 64), torch.tensor([64]), torch.tensor([8]), 1, 1, 8, "softmax")
    assert window.unique().numel() == 8


def test_far_pages_keep_their_order_where_a_softmax_would_underflow():
    scores = torch.arange(0.0, 6400.0, 100.0)[None, None, None]
    window = select_pages(scores, torch.tensor([64]), torch.tensor([8]), 1, 1, 8, "softmax")
    assert window[0, 0].tolist() == [0, *range(57, 63), 63]


def test_what_lies_past_a_requests_pages_is_never_selected():
    scores = torch.randn(1, 1, 1, 40)
    scores[..., 20:] = float("nan")
    window = select_pages(scores, torch.tensor([20]), torch.tensor([8]), 1, 1, 8, "mean")
    assert window.max() == 19


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="expected 'softmax' or 'mean', got 'max'"):
        select_pages(torch.zeros(1, 1, 1, 9), torch.tensor([9]), torch.tensor([4]), 1, 1, 4, "max")
