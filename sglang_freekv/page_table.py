"""From token slots to pages: the snapshot that a step works on."""

from __future__ import annotations

from typing import NamedTuple

import torch


def num_pages_of(num_tokens: int, page_size: int) -> int:
    return (num_tokens + page_size - 1) // page_size


def snapshot_page_table(
    rows: torch.Tensor, req_to_token: torch.Tensor, max_tokens: int, page_size: int
) -> torch.Tensor:
    """Copy the page table of a batch: int64 ``[batch_size, ceil(max_tokens / page_size)]``, logical page -> host page.

    A copy, because the scheduler may rewrite `req_to_token` while the step runs. Entries past a request are whatever
    an earlier owner of the row left there: existing pages, never read as this request's.
    """
    return req_to_token[rows, :max_tokens:page_size].long() // page_size


class WindowKeys(NamedTuple):
    """A window in terms of the block table."""

    keys: torch.Tensor  # int64 [batch_size, num_kv_heads, num_entries], host page * num_kv_heads + head
    is_valid: torch.Tensor  # bool, same shape; False for padding and for a page that is not opened yet: key of page 0


def window_keys(window: torch.Tensor, page_table: torch.Tensor, num_pages: torch.Tensor) -> WindowKeys:
    """Translate logical pages to keys of the block table.

    Parameters
    ----------
    window : int, ``[batch_size, num_kv_heads, num_entries]``
        Logical pages, -1 padded.
    page_table : int64, ``[batch_size, max_pages]``
    num_pages : int64, ``[batch_size]``
        Pages that exist: a back window may already list the page that the next token opens.
    """
    window = window.long()
    is_valid = (window >= 0) & (window < num_pages[:, None, None])
    pages = page_table.gather(1, window.where(is_valid, 0).flatten(1)).view_as(window).where(is_valid, 0)
    return WindowKeys(pages * window.shape[1] + torch.arange(window.shape[1])[:, None], is_valid)


def every_key(page_table: torch.Tensor, num_pages: torch.Tensor, num_kv_heads: int) -> WindowKeys:
    """Keys of all pages of each request, in order: the window of a request within its budget, and of a dense layer.

    Parameters
    ----------
    page_table : int64, ``[batch_size, max_pages]``
    num_pages : int64, ``[batch_size]``
    num_kv_heads : int
    """
    is_valid = torch.arange(page_table.shape[1]) < num_pages[:, None]
    keys = page_table.where(is_valid, 0)[:, None] * num_kv_heads + torch.arange(num_kv_heads)[:, None]
    return WindowKeys(keys, is_valid[:, None].expand_as(keys))
