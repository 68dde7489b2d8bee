"""Score pages: an upper bound of the attention logit of every token of a page."""

from __future__ import annotations

import torch


def score_pages(q: torch.Tensor, summary: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
    """Bound the logits of each page for each query head.

    score[b, h, g, p] = sum_d max(q[b, h, g, d] * lo, q[b, h, g, d] * hi),  lo, hi = summary[page_table[b, p], h]

    As lo <= hi, the larger product takes hi where q > 0 and lo elsewhere: one matrix product.

    Parameters
    ----------
    q : model dtype, ``[batch_size, num_kv_heads, group_size, head_dim]``, device
        Post-RoPE queries.
    summary : model dtype, ``[num_pages, num_kv_heads, 2, head_dim]``, device
    page_table : int64, ``[batch_size, max_pages]``, device
        Logical page -> host page; entries past a request's pages may be any page, their scores mean nothing.

    Returns
    -------
    float32, ``[batch_size, num_kv_heads, group_size, max_pages]``
        Unscaled (no 1 / sqrt(head_dim)), as in the paper.

    Notes
    -----
    Source: Quest's bound, FreeKV (arXiv 2505.13109); kept in fp32, where the authors' engine rounds scores to bf16.
    """
    num_pages, num_kv_heads, _, head_dim = summary.shape
    heads = torch.arange(num_kv_heads, device=q.device)[:, None]
    records = page_table[:, None] * num_kv_heads + heads  # [batch_size, num_kv_heads, max_pages]
    bounds = summary.view(num_pages * num_kv_heads, 2 * head_dim).index_select(0, records.flatten()).float()
    q = q.float()
    q = torch.cat((q.clamp(max=0), q.clamp(min=0)), -1)  # the halves meet lo and hi
    return q @ bounds.view(*records.shape, 2 * head_dim).transpose(-1, -2)
