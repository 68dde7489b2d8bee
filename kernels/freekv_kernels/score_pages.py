"""Score pages: an upper bound of the attention logit of every token of a page."""

from __future__ import annotations

import torch


def score_pages(q: torch.Tensor, summary: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
    """Bound the logits of each page for each query head.

    score[b, h, g, p] = sum_d max(q[b, h, g, d] * lo, q[b, h, g, d] * hi),  lo, hi = summary[page_table[b, p], h]

    As lo <= hi, the larger product takes hi where q > 0 and lo elsewhere: two matrix products.

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
    bounds = summary[page_table].float()  # [batch_size, max_pages, num_kv_heads, 2, head_dim]
    low, high = bounds.permute(0, 2, 3, 4, 1).unbind(2)  # [batch_size, num_kv_heads, head_dim, max_pages]
    q = q.float()
    return torch.matmul(q.clamp(min=0), high) + torch.matmul(q.clamp(max=0), low)
