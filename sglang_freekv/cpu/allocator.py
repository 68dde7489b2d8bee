"""SGLang's paged allocator without its Triton kernels, for machines without a GPU."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages


def extend_slots(
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    page_size: int,
) -> torch.Tensor:
    """Lay new tokens out in the rest of each request's last page, then in fresh pages.

    Parameters
    ----------
    prefix_lens, seq_lens : int64, ``[batch_size]``, cpu
        Tokens of each request before and after.
    last_loc : int64, ``[batch_size]``, cpu
        Token slot of the last token before; -1 where the prefix is empty.
    free_pages : int64, ``[>= pages needed]``, cpu
        Page ids, taken from the front, requests in order.

    Returns
    -------
    int64, ``[sum(seq_lens - prefix_lens)]``
        Token slots, requests concatenated in order.
    """
    extend_lens = seq_lens - prefix_lens
    first_new_page = -(prefix_lens // -page_size)  # logical, per request
    num_new_pages = -(seq_lens // -page_size) - first_new_page
    request = torch.repeat_interleave(extend_lens)  # [num_tokens]
    offset = torch.arange(len(request)) - (extend_lens.cumsum(0) - extend_lens)[request]
    position = prefix_lens[request] + offset
    nth_new_page = position // page_size - first_new_page[request]  # -1 in the page the prefix ends in
    taken = (num_new_pages.cumsum(0) - num_new_pages)[request] + nth_new_page
    fresh = nth_new_page >= 0
    slots = last_loc[request] + 1 + offset
    slots[fresh] = free_pages[taken[fresh]] * page_size + position[fresh] % page_size
    return slots


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """`PagedTokenToKVPoolAllocator` whose two Triton launches are torch operations.

    Bookkeeping (free list, groups, sorting) is SGLang's. Works for every page size, 1 included.
    """

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Return token slots for ``seq_lens - prefix_lens`` new tokens, or None where pages are short."""
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        pages = self._take_pages(num_new_pages)
        if pages is None:
            return None
        return extend_slots(prefix_lens, seq_lens, last_loc, pages, self.page_size)

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the token slot of each request's next token, or None where pages are short."""
        # Not `decode=True`, which counts no page where a page is one token.
        num_new_pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=seq_lens_cpu - 1)
        pages = self._take_pages(num_new_pages)
        if pages is None:
            return None
        return extend_slots(seq_lens - 1, seq_lens, last_loc, pages, self.page_size)

    def _take_pages(self, num_pages: int) -> torch.Tensor | None:
        """Cut `num_pages` page ids from the free list; None, and nothing changed, where it is shorter."""
        if self.need_sort and num_pages > len(self.free_pages):
            self.merge_and_sort_free()
        if num_pages > len(self.free_pages):
            return None
        pages, self.free_pages = self.free_pages[:num_pages], self.free_pages[num_pages:]
        return pages
