"""Cutting prefixes into pieces that fit the prefill arena."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sglang_freekv.memory.geometry import num_pages_of


@dataclass(frozen=True)
class PrefixPiece:
    """A run of one request's prefix pages, as laid out in the arena."""

    request: int  # index in the batch
    pages: torch.Tensor  # int64 [num_pages], host pages
    first_token: int  # in the arena
    num_tokens: int  # fewer than the pages hold where the prefix ends inside a page


def cut_prefixes(
    page_table: torch.Tensor, prefix_lens: list[int], arena_pages: int, page_size: int
) -> Iterator[list[PrefixPiece]]:
    """Yield groups of pieces; the pieces of a group fit the arena together.

    Parameters
    ----------
    page_table : int64, ``[batch_size, max_pages]``
    prefix_lens : list of int, tokens
    """
    group, used = [], 0
    for request, prefix_len in enumerate(prefix_lens):
        first, num_pages = 0, num_pages_of(prefix_len, page_size)
        while first < num_pages:
            if used == arena_pages:
                yield group
                group, used = [], 0
            count = min(num_pages - first, arena_pages - used)
            num_tokens = min(prefix_len - first * page_size, count * page_size)
            pages = page_table[request, first : first + count]
            group.append(PrefixPiece(request, pages, used * page_size, num_tokens))
            first, used = first + count, used + count
    if group:
        yield group


def cut_tails(
    page_table: torch.Tensor, prefix_lens: list[int], arena_pages: int, page_size: int, sliding_window: int
) -> Iterator[list[PrefixPiece]]:
    """Yield groups of the pieces that a sliding window sees of each prefix: its last tokens, in whole pages.

    Parameters
    ----------
    page_table : int64, ``[batch_size, max_pages]``
    prefix_lens : list of int, tokens
    arena_pages : int
        At least as many as a window lies in; a piece is not cut.
    sliding_window : int
        Tokens that a query sees, its own included.
    """
    group, used = [], 0
    for request, prefix_len in enumerate(prefix_lens):
        first = max(prefix_len - sliding_window + 1, 0) // page_size
        count = num_pages_of(prefix_len, page_size) - first
        num_tokens = prefix_len - first * page_size
        if num_tokens <= 0 or sliding_window == 1:
            continue
        if used + count > arena_pages:
            yield group
            group, used = [], 0
        group.append(PrefixPiece(request, page_table[request, first : first + count], used * page_size, num_tokens))
        used += count
    if group:
        yield group
