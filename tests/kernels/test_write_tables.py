"""A step begins with tables of its own, and with the pages open that its tokens start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from freekv_kernels import GROUP_PAGES, Batch, PairList

PAGE, LAYERS, HEADS, WIDTH = 8, 3, 2, 5
MAX_REQUESTS, MAX_PAGES, HOST_PAGES = 7, 12, 40
STALE = 77


class Step:
    """Requests with the given rows and lengths, on random host pages, and a begun step of theirs."""

    def __init__(
        self,
        impl: SimpleNamespace,
        rows: list[int],
        lens: list[int],
        budgets: list[int] | None = None,
        num_slots: int | None = None,
        len_dtype: torch.dtype = torch.int64,
        num_layers: int = LAYERS,
        num_kv_heads: int = HEADS,
    ) -> None:
        def stale(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full(shape, STALE, dtype=dtype, device=impl.device)

        size = len(rows)
        self.rows, self.lens = torch.tensor(rows), torch.tensor(lens)
        self.host_pages = torch.stack([torch.randperm(HOST_PAGES - 1)[:MAX_PAGES] + 1 for _ in range(MAX_REQUESTS + 1)])
        req_to_token = (self.host_pages[:, :, None] * PAGE + torch.arange(PAGE)).flatten(1).int()
        self.slots = req_to_token[self.rows, self.lens - 1].long()[:num_slots]
        budget_pages = torch.full((MAX_REQUESTS + 1, num_kv_heads), WIDTH)
        for row, budget in zip(rows, budgets or [], strict=False):
            budget_pages[row] = budget
        self.budget_pages = budget_pages

        self.buffers = Batch(
            *(stale(MAX_REQUESTS) for _ in range(2)),
            stale(MAX_REQUESTS, MAX_PAGES),
            *(stale(MAX_REQUESTS) for _ in range(2)),
            stale(MAX_REQUESTS, num_kv_heads),
            torch.zeros(1, dtype=torch.int64, device=impl.device),
            stale(MAX_REQUESTS, GROUP_PAGES),
        )
        self.batch = Batch(*(x[:size] for x in self.buffers[:6]), self.buffers.step, self.buffers.groups[:size])
        self.last_page_len = stale(MAX_REQUESTS * num_kv_heads, dtype=torch.int32)
        self.windows = stale(2, num_layers, MAX_REQUESTS + 1, num_kv_heads, WIDTH, dtype=torch.int32)
        self.filled = stale(HOST_PAGES, dtype=torch.int32)
        self.opened = PairList(stale(MAX_REQUESTS * num_kv_heads), stale(1, dtype=torch.int32))
        impl.ops.write_tables(
            self.rows.to(impl.device),
            self.lens.to(impl.device, len_dtype),
            self.slots.to(impl.device),
            req_to_token.to(impl.device),
            budget_pages.to(impl.device),
            PAGE,
            self.batch,
            self.last_page_len,
            self.windows,
            self.filled,
            self.opened,
        )


def test_every_request_finds_its_host_pages_and_its_lengths(impl):
    step = Step(impl, rows=[4, 1, 6, 2], lens=[1, PAGE, PAGE + 1, 3 * PAGE + 5])
    assert step.batch.rows.tolist() == [4, 1, 6, 2]
    assert step.batch.slots.tolist() == step.slots.tolist()
    assert step.batch.num_pages.tolist() == [1, 1, 2, 4]
    assert step.batch.num_pages_next.tolist() == [1, 2, 2, 4]
    assert step.batch.budget_pages.tolist() == [[WIDTH] * HEADS] * 4
    assert step.last_page_len[: 4 * HEADS].tolist() == [1] * HEADS + [PAGE] * HEADS + [1] * HEADS + [5] * HEADS
    for request, row in enumerate([4, 1, 6, 2]):
        num_pages = step.batch.num_pages[request]
        assert step.batch.page_table[request, :num_pages].tolist() == step.host_pages[row, :num_pages].tolist()


def test_a_request_whose_token_lies_in_the_last_page_of_a_group_has_the_groups_host_pages(impl):
    lens = [3 * PAGE + 1, 4 * PAGE, 4 * PAGE + 1, 11 * PAGE + 3, 2, 1]
    step = Step(impl, rows=[4, 1, 6, 2, 3, 0], lens=lens)
    none = [-1] * GROUP_PAGES
    pages = step.host_pages.tolist()
    assert step.batch.groups.tolist() == [pages[4][:4], pages[1][:4], none, pages[2][8:12], none, none]
    assert (step.buffers.groups[6:] == STALE).all()


def test_pages_that_a_request_does_not_have_keep_their_entries(impl):
    step = Step(impl, rows=[3, 5], lens=[MAX_PAGES * PAGE, 2 * PAGE])
    assert step.batch.page_table[0].tolist() == step.host_pages[3].tolist()
    assert (step.batch.page_table[1, 2:] == STALE).all()


def test_buffers_beyond_the_batch_are_left_alone(impl):
    step = Step(impl, rows=[4, 1], lens=[PAGE + 1, 3])
    for buffer in step.buffers[:6]:
        assert (buffer[2:] == STALE).all()
    assert step.buffers.step == 0
    assert (step.last_page_len[2 * HEADS :] == STALE).all()


@pytest.mark.parametrize("len_dtype", [torch.int32, torch.int64])
def test_lengths_may_have_either_integer_type(impl, len_dtype):
    step = Step(impl, rows=[2], lens=[2 * PAGE + 3], len_dtype=len_dtype)
    assert step.batch.num_pages.item() == 3
    assert step.last_page_len[:HEADS].tolist() == [3] * HEADS


def test_padding_has_no_pages_and_the_padding_slot(impl):
    step = Step(impl, rows=[5, 0, 0], lens=[PAGE + 2, 1, 1], num_slots=1)
    assert step.batch.rows.tolist() == [5, 0, 0]
    assert step.batch.slots.tolist() == [step.slots.item(), 0, 0]
    assert step.batch.num_pages.tolist() == [2, 0, 0]
    assert step.batch.num_pages_next.tolist() == [2, 0, 0]
    assert (step.batch.page_table[1:] == STALE).all()
    assert step.last_page_len[: 3 * HEADS].tolist() == [2] * HEADS + [1] * 2 * HEADS
    assert step.opened.count == 0
    assert (step.windows == STALE).all()


def test_a_batch_of_padding_alone_can_begin(impl):
    step = Step(impl, rows=[0, 0], lens=[1, 1], num_slots=0)
    assert step.batch.num_pages.tolist() == [0, 0]
    assert step.opened.count == 0
    assert (step.windows == STALE).all()


def test_filled_counts_the_tokens_of_the_pages_that_are_written(impl):
    step = Step(impl, rows=[4, 1, 6], lens=[PAGE + 1, PAGE, 3 * PAGE + 5])
    expected = torch.full((HOST_PAGES,), STALE)
    for row, length in zip([4, 1, 6], [PAGE + 1, PAGE, 3 * PAGE + 5], strict=True):
        expected[step.host_pages[row, (length - 1) // PAGE]] = (length - 1) % PAGE + 1
    assert step.filled.tolist() == expected.tolist()


def test_the_pairs_of_opened_pages_are_listed_and_no_others(impl):
    step = Step(impl, rows=[4, 1, 6, 2], lens=[1, PAGE, 2 * PAGE + 1, 3])
    pages = [step.host_pages[4, 0].item(), step.host_pages[6, 2].item()]
    count = step.opened.count.item()
    assert sorted(step.opened.pairs[:count].tolist()) == sorted(p * HEADS + h for p in pages for h in range(HEADS))
    assert (step.opened.pairs[count:] == STALE).all()


def test_a_request_within_its_budget_attends_to_the_page_it_opens(impl):
    step = Step(impl, rows=[4, 1], lens=[2 * PAGE + 1, 2 * PAGE + 2])
    expected = torch.full_like(step.windows, STALE)
    expected[:, :, 4, :, 2] = 2
    assert torch.equal(step.windows, expected)


def test_the_page_that_fills_the_budget_is_added_and_the_next_is_not(impl):
    fills = Step(impl, rows=[4, 1], lens=[2 * PAGE + 1, 3 * PAGE + 1], budgets=[3, 3])
    expected = torch.full_like(fills.windows, STALE)
    expected[:, :, 4, :, 2] = 2
    assert torch.equal(fills.windows, expected)
    assert fills.opened.count == 2 * HEADS  # over its budget or not, a page that starts is opened
    assert fills.batch.budget_pages.tolist() == [[3] * HEADS] * 2


def test_more_requests_than_one_vector_are_listed_in_turn(impl, monkeypatch):
    if impl.name == "triton":
        from freekv_kernels import write_tables_triton

        monkeypatch.setattr(write_tables_triton, "_BLOCK_REQUESTS", 2)
        monkeypatch.setattr(write_tables_triton, "_BLOCK_PAGES", 4)
    lens = [1, PAGE + 1, PAGE, 4 * PAGE + 1, 2 * PAGE + 1]
    step = Step(impl, rows=[5, 1, 4, 2, 3], lens=lens)
    pages = [step.host_pages[row, (n - 1) // PAGE].item() for row, n in zip([5, 1, 2, 3], [1, 9, 33, 17], strict=True)]
    pairs = [page * HEADS + head for page in pages for head in range(HEADS)]
    assert step.opened.pairs[: step.opened.count].tolist() == pairs
    for request, row in enumerate([5, 1, 4, 2, 3]):
        num_pages = step.batch.num_pages[request]
        assert step.batch.page_table[request, :num_pages].tolist() == step.host_pages[row, :num_pages].tolist()


@pytest.mark.parametrize("num_layers, num_kv_heads", [(1, 1), (5, 3)])
def test_heads_and_layers_may_be_any_number(impl, num_layers, num_kv_heads):
    step = Step(impl, rows=[3, 1], lens=[PAGE + 1, 4], num_layers=num_layers, num_kv_heads=num_kv_heads)
    page = step.host_pages[3, 1].item()
    assert step.opened.pairs[: step.opened.count].tolist() == [page * num_kv_heads + h for h in range(num_kv_heads)]
    expected = torch.full_like(step.windows, STALE)
    expected[:, :, 3, :, 1] = 1
    assert torch.equal(step.windows, expected)
    assert step.last_page_len[: 2 * num_kv_heads].tolist() == [1] * num_kv_heads + [4] * num_kv_heads
