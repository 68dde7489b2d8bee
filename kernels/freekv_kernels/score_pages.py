"""Score pages: the largest attention logit of a page's tokens, bounded by its summary or estimated by its codes."""

from __future__ import annotations

import torch

from freekv_kernels.encode_pages import code_steps, unpack_parts
from freekv_kernels.tables import Batch, FlagList, Read


def score_pages(
    queries: torch.Tensor,
    summary: torch.Tensor,
    batch: Batch,
    read: Read,
    flags: FlagList | None = None,
    out: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score each page for each query head, in the rows of requests over their budget.

    With q = queries[rows[b], h, g] and lo, hi = summary[page_table[b, p], h], for p < num_pages[b]:
      without codes  score[b, h, g, p] = sum_d max(q[d] * lo[d], q[d] * hi[d]), a bound
      with codes     score[b, h, g, p] = max over the tokens of sum_d q[d] * k'[d], k' of `encode_pages`

    As lo <= hi, the larger product takes hi where q > 0 and lo elsewhere: one matrix product.

    Parameters
    ----------
    queries : model dtype, ``[max_requests + 1, num_kv_heads, group_size, head_dim]``, device
        Post-RoPE queries by row of the request table.
    summary : model dtype, ``[num_pages, num_kv_heads, 2, head_dim]``, device
    batch : Batch
    read : Read
        A request is over its budget if its pages at that step are.
    flags : FlagList, optional
        Only these rows; by default every row.
    out : float32, ``[batch_size * num_kv_heads, group_size, max_pages]``, device, optional
        Where to write; entries of other rows, and past a request's pages, keep their values. `select_pages` may use the
        scored rows as its workspace.
    codes : uint8, ``[num_pages, num_kv_heads, page_size, head_dim * bits // 8]``, device, optional
        The score of a page that is not full is undefined with them, and may be NaN.

    Returns
    -------
    out, or a new tensor with undefined values in those entries
        Unscaled (no 1 / sqrt(head_dim)), as in the paper.

    Notes
    -----
    Source: Quest's bound, FreeKV (arXiv 2505.13109); kept in fp32, where the authors' engine rounds scores to bf16.
    """
    num_pages, num_kv_heads, _, head_dim = summary.shape
    max_pages = batch.page_table.shape[1]
    group_size = queries.shape[2]
    shape = (len(batch.rows) * num_kv_heads, group_size, max_pages)
    rows = listed_rows(batch, read, num_kv_heads, flags)
    if len(rows) == 0:
        return queries.new_empty(shape, dtype=torch.float32) if out is None else out
    request, head = rows // num_kv_heads, rows % num_kv_heads
    records = batch.page_table[request] * num_kv_heads + head[:, None]  # [n, max_pages]
    bounds = summary.view(num_pages * num_kv_heads, 2 * head_dim).index_select(0, records.flatten()).float()
    q = queries[batch.rows[request], head].float()
    bounds = bounds.view(*records.shape, 2, head_dim)
    if codes is None:
        q = torch.cat((q.clamp(max=0), q.clamp(min=0)), -1)  # the halves meet lo and hi
        scores = q @ bounds.flatten(2).transpose(-1, -2)
    else:
        scores = _score_codes(q, bounds, codes.flatten(0, 1), records)
    if out is not None:
        is_page = torch.arange(max_pages, device=out.device) < batch.num_pages[request, None]
        out[rows, :, :max_pages] = scores.where(is_page[:, None], out[rows, :, :max_pages])
        return out
    if flags is None and len(rows) == shape[0]:
        return scores
    return scores.new_empty(shape).index_copy_(0, rows, scores)


def _score_codes(q: torch.Tensor, bounds: torch.Tensor, codes: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
    """Scores ``[n, group_size, max_pages]`` by codes ``[num_pages * num_kv_heads, page_size, bytes]``."""
    bits = codes.shape[-1] * 8 // q.shape[-1]
    low, step = code_steps(bounds, bits)  # [n, max_pages, head_dim]
    scores = q @ (low + step / 2).transpose(-1, -2)
    for row, row_scores in enumerate(scores):  # a row's tokens fit a cache
        parts = unpack_parts(codes[records[row]], bits)  # [max_pages, page_size, bytes] each
        by_step = (q[row] * step[row, :, None]).chunk(8 // bits, -1)  # [max_pages, group_size, bytes] each
        products = by_step[0] @ next(parts).float().transpose(1, 2)
        for of_part, part in zip(by_step[1:], parts, strict=True):
            products.baddbmm_(of_part, part.float().transpose(1, 2))
        row_scores += products.amax(-1).T
    return scores


def listed_rows(batch: Batch, read: Read, num_kv_heads: int, flags: FlagList | None) -> torch.Tensor:
    """Rows (int64) of requests over their budget when `read` is read; of `flags`, which are such rows, if given."""
    if flags is not None:
        return flags.rows[: int(flags.count)].long()
    is_over = (batch.num_pages_at(read) > batch.budget_pages)[:, None].expand(-1, num_kv_heads)
    return is_over.flatten().nonzero().flatten()
