"""From token slots to pages, and from lists on the host to tensors on the device."""

from __future__ import annotations

import torch


def num_pages_of(num_tokens: int, page_size: int) -> int:
    return (num_tokens + page_size - 1) // page_size


def to_device(values: list[int], device: str) -> torch.Tensor:
    """Copy to an int64 tensor on the device without waiting for what the device still does."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def snapshot_page_table(
    rows: torch.Tensor, req_to_token: torch.Tensor, max_tokens: int, page_size: int
) -> torch.Tensor:
    """Copy the page table of a batch: int64 ``[batch_size, ceil(max_tokens / page_size)]``, logical page -> host page.

    A copy, because the scheduler may rewrite `req_to_token` while the batch runs. Entries past a request are whatever
    an earlier owner of the row left there: existing pages, never read as this request's.
    """
    return req_to_token[rows, :max_tokens:page_size].long() // page_size
