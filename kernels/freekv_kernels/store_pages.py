"""Write a prefill chunk through: to the host store, the page summaries and the resident blocks."""

from __future__ import annotations

import torch

from freekv_kernels.records import records_at
from freekv_kernels.summarize_pages import summarize_pages
from freekv_kernels.tables import PageStore


def store_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    page_starts: torch.Tensor,
    store: PageStore,
) -> None:
    """Convert tokens from NHD to head-major pages and write them, once, in place.

    For every token, with page, offset = divmod(slot, page_size), and every KV head h:
      the record of (page, h) takes k, v at offset
      summary[page, h] = min and max with k, rounded outwards, see `fp8`; a token at offset 0 opens its page, and what
      was there is dropped
      block_kv[table[page, h], :, offset] = what the record reads back as, where the page's head is resident

    Parameters
    ----------
    k, v : model dtype, ``[num_tokens, num_kv_heads, head_dim]``, device
        Post-RoPE keys, and values.
    slots : int64, ``[num_tokens]``, device
        Token slots; the tokens of one page are adjacent, and so are their slots.
    page_starts : int64, ``[num_runs + 1]``, device
        Index of the first token of each page, and num_tokens.
    store : PageStore
        Of one layer, written. A page that is resident although its first token is not in this chunk holds its earlier
        tokens.
    """
    page_size = store.block_kv.shape[2]
    pages, offsets = slots // page_size, slots % page_size
    store.codec.write_tokens(store.host_kv, pages, offsets, torch.stack((k, v), 2))
    if store.summary is not None:
        summarize_pages(store.summary, k, slots, page_size)

    pages = pages[page_starts[:-1]]
    blocks = store.table[pages].long()
    run, head = (blocks >= 0).nonzero(as_tuple=True)
    records = records_at(store.host_kv, pages[run], head)  # earlier tokens of the page are equal already
    store.block_kv[blocks[run, head]] = store.codec.decode(records, store.block_kv.dtype)
