"""A dense layer's list is every page of each request, head by head."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from freekv_kernels import Batch

MAX_PAGES, STALE = 9, 77


def list_pages(impl: SimpleNamespace, num_pages: list[int], num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The page table, and what is listed of it: padding has an entry per row that it does not have a page for."""
    size = len(num_pages)
    buffer = torch.randint(1, 100, (size + 2, MAX_PAGES + 3), device=impl.device)
    per_request = torch.tensor(num_pages, device=impl.device)
    batch = Batch(per_request, per_request, buffer[:size, :MAX_PAGES], *[per_request] * 3, per_request[:1])
    entries = torch.tensor(num_pages).clamp(min=1).repeat_interleave(num_kv_heads)
    kv_indptr = torch.cat((torch.zeros(1, dtype=torch.int64), entries.cumsum(0))).int().to(impl.device)
    kv_indices = torch.full((int(entries.sum()) + 20,), STALE, dtype=torch.int32, device=impl.device)
    impl.ops.list_pages(batch, num_kv_heads, kv_indptr, kv_indices)
    return batch.page_table, kv_indices


def expected(page_table: torch.Tensor, num_pages: list[int], num_kv_heads: int) -> list[int]:
    pairs = []
    for request, count in enumerate(num_pages):
        for head in range(num_kv_heads):
            pages = page_table[request, :count].tolist()
            pairs += [page * num_kv_heads + head for page in pages] or [0]
    return pairs


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
@pytest.mark.parametrize("num_pages", [[1], [MAX_PAGES], [4, MAX_PAGES, 1, 6], [0], [5, 0, 0]])
def test_every_page_is_listed_in_order_and_padding_reads_key_0(impl, num_pages, num_kv_heads):
    page_table, kv_indices = list_pages(impl, num_pages, num_kv_heads)
    pairs = expected(page_table, num_pages, num_kv_heads)
    assert kv_indices[: len(pairs)].tolist() == pairs
    assert (kv_indices[len(pairs) :] == STALE).all()


def test_pages_of_several_blocks_are_listed(impl, monkeypatch):
    if impl.name == "triton":
        from freekv_kernels import list_pages_triton

        monkeypatch.setattr(list_pages_triton, "_BLOCK_PAGES", 4)
    page_table, kv_indices = list_pages(impl, [MAX_PAGES, 0, 5, 4], 2)
    pairs = expected(page_table, [MAX_PAGES, 0, 5, 4], 2)
    assert kv_indices[: len(pairs)].tolist() == pairs
    assert (kv_indices[len(pairs) :] == STALE).all()
