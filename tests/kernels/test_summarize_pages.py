"""Summaries bound the keys of a page, however many calls fill it."""

import torch

from freekv_kernels import summarize_pages
from tests.support import fp8

PAGE = 8


def test_a_summary_is_the_min_and_max_of_the_keys_even_when_a_chunk_ends_inside_a_page():
    keys = torch.randn(29, 2, 16)
    pages = torch.tensor([5, 2, 7, 1])
    slots = pages.repeat_interleave(PAGE)[:29] * PAGE + torch.arange(29) % PAGE
    summary = torch.full((9, 2, 2, 16), 0x7E, dtype=torch.uint8)  # what earlier owners left: 448
    for start, end in ((0, 3), (3, 4), (4, 21), (21, 29)):
        summarize_pages(summary, keys[start:end], slots[start:end], PAGE)
    for i, page in enumerate(pages.tolist()):
        own = keys[i * PAGE : (i + 1) * PAGE]
        assert torch.equal(summary[page, :, 0], fp8.below(own.amin(0)))
        assert torch.equal(summary[page, :, 1], fp8.above(own.amax(0)))


def test_a_page_opened_again_forgets_its_last_owner():
    summary = torch.zeros(3, 1, 2, 4, dtype=torch.uint8)
    slots = torch.arange(PAGE, 2 * PAGE)
    summarize_pages(summary, torch.full((PAGE, 1, 4), 100.0), slots, PAGE)
    summarize_pages(summary, torch.ones(1, 1, 4), slots[:1], PAGE)
    assert (fp8.numbers(summary[1]) == 1).all()


def test_pages_that_get_no_token_keep_their_summary():
    summary = torch.randint(0x7F, (4, 2, 2, 4), dtype=torch.uint8)
    before = summary.clone()
    summarize_pages(summary, torch.randn(2, 2, 4), torch.tensor([PAGE, PAGE + 1]), PAGE)
    assert torch.equal(summary[[0, 2, 3]], before[[0, 2, 3]])
