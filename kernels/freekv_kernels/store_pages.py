"""Write a prefill chunk through: to the host store, the page summaries and the resident blocks."""

from __future__ import annotations

import torch

from freekv_kernels.summarize_pages import summarize_pages


def store_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    page_starts: torch.Tensor,
    host_kv: torch.Tensor,
    summary: torch.Tensor,
    block_kv: torch.Tensor,
    table: torch.Tensor,
) -> None:
    """Convert tokens from NHD to head-major pages and write them, once, in place.

    For every token, with page, offset = divmod(slot, page_size), and every KV head h:
      host_kv[page, h, 0 | 1, offset] = k | v
      summary[page, h] = min and max with k; a token at offset 0 opens its page, and what was there is dropped
      block_kv[table[page, h], 0 | 1, offset] = k | v   where the page's head is resident

    Parameters
    ----------
    k, v : model dtype, ``[num_tokens, num_kv_heads, head_dim]``, device
        Post-RoPE keys, and values.
    slots : int64, ``[num_tokens]``, device
        Token slots; the tokens of one page are adjacent, and so are their slots.
    page_starts : int64, ``[num_runs + 1]``, device
        Index of the first token of each page, and num_tokens.
    host_kv : model dtype, ``[num_pages, num_kv_heads, 2, page_size, head_dim]``, CPU (pinned)
        One layer of the host store, a strided view.
    summary : model dtype, ``[num_pages, num_kv_heads, 2, head_dim]``, device
    block_kv : model dtype, ``[num_blocks, 2, page_size, head_dim]``, device
    table : int32, ``[num_pages, num_kv_heads]``, device
        A page that is resident although its first token is not in this chunk holds its earlier tokens.
    """
    page_size = host_kv.shape[3]
    pages, offsets = slots // page_size, slots % page_size
    host_kv[pages, :, 0, offsets] = k
    host_kv[pages, :, 1, offsets] = v
    summarize_pages(summary, k, slots, page_size)

    pages = pages[page_starts[:-1]]
    blocks = table[pages].long()
    run, head = (blocks >= 0).nonzero(as_tuple=True)
    block_kv[blocks[run, head]] = host_kv[pages[run], head]  # earlier tokens of the page are equal already
