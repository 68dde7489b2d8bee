"""Small batches and lists for the tests of ops."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from freekv_kernels import Batch, FlagList, PageStore
from tests.support import fp8


def batch_of(
    page_table: torch.Tensor,
    num_pages: Iterable[int],
    budgets: Iterable[int | list[int]],
    rows: Iterable[int] | None = None,
    num_pages_next: Iterable[int] | None = None,
    step: int = 0,
    num_kv_heads: int = 2,
) -> Batch:
    """A batch on the device of its page table; by default in rows 1, 2, ... and opening no page in the next step.

    A budget is a number for all heads of a request, or one for each.
    """
    num_pages = list(num_pages)
    rows = range(1, len(num_pages) + 1) if rows is None else rows
    following = num_pages if num_pages_next is None else num_pages_next
    budgets = [[pages] * num_kv_heads if isinstance(pages, int) else pages for pages in budgets]
    rows, num_pages, following, budgets, step = (
        torch.tensor(list(x), device=page_table.device) for x in (rows, num_pages, following, budgets, [step])
    )
    return Batch(rows, torch.zeros_like(rows), page_table, num_pages, following, budgets, step)


def flags_of(rows: list[int], num_rows: int, device: str) -> FlagList:
    """A list of flagged rows; past its count lies anything."""
    listed = torch.full((num_rows,), 10**6, dtype=torch.int32)
    listed[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
    count = torch.tensor([len(rows)], dtype=torch.int32)
    return FlagList(listed.to(device), count.to(device), torch.zeros(num_rows, dtype=torch.bool, device=device))


def store_of(host: torch.Tensor, summary: torch.Tensor) -> PageStore:
    """One layer of a host store (``[num_host_pages, num_kv_heads, 2, page_size, head_dim]``) without a block."""
    block_kv = torch.empty(0, *host.shape[2:], dtype=host.dtype, device=summary.device)
    table = torch.full(host.shape[:2], -1, dtype=torch.int32, device=summary.device)
    return PageStore(host, summary, block_kv, table)


def decode_keys(summary: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What codes ``[..., page_size, bytes]`` stand for, and the steps: float64 ``[..., page_size or 1, head_dim]``."""
    low, high = fp8.numbers(summary).unsqueeze(-3).unbind(-2)
    num_bytes, channel = codes.shape[-1], torch.arange(low.shape[-1])
    bits = num_bytes * 8 // len(channel)
    code = (codes.cpu()[..., channel % num_bytes] >> (channel // num_bytes * bits)) & (2**bits - 1)
    step = (high - low) / 2**bits
    return low + (code + 0.5) * step, step
