"""Score pages: a page's largest logit, bounded by its summary or estimated by its codes, or its mass of attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from freekv_kernels.encode_pages import code_steps, unpack_codes
from freekv_kernels.fp8 import decode_fp8
from freekv_kernels.tables import Batch, FlagList, Half

_PIECE = 1 << 19  # bytes of codes that are decoded at a time; as numbers they take 16 times as much


def score_pages(
    queries: torch.Tensor,
    summary: torch.Tensor,
    batch: Batch,
    half: Half,
    flags: FlagList | None = None,
    out: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    scale: float | None = None,
    pages: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score each page for each query head, in the rows over their budget.

    With q = queries[rows[b], h, g] and lo, hi = the bounds summary[page_table[b, p], h], for p < num_pages[b]:
      without codes  score[b, h, g, p] = sum_d max(q[d] * lo[d], q[d] * hi[d]), a bound
      with codes     score[b, h, g, p] = max over the tokens of sum_d q[d] * k'[d], k' of `encode_pages`
      and a scale    score[b, h, g, p] = log of the sum over the tokens of exp(scale * sum_d q[d] * k'[d])

    By default p is the column; of a list of pages, the page p = pages[row, c] of column c.
    As lo <= hi, the larger product takes hi where q > 0 and lo elsewhere: one matrix product.

    Parameters
    ----------
    queries : model dtype, ``[max_requests + 1, num_kv_heads, group_size, head_dim]``, device
        Post-RoPE queries by row of the request table.
    summary : uint8, ``[num_host_pages, num_kv_heads, 2, head_dim]``, device
        Bounds in FP8, see `fp8`.
    batch : Batch
    half : Half
        A row is over its budget if its request's pages at that step are.
    flags : FlagList, optional
        Only these rows; by default every row.
    out : float32, ``[batch_size * num_kv_heads, group_size, max_pages or num_listed]``, device, optional
        Where to write; entries of other rows, past a request's pages, and of columns without a page, keep their values.
        `select_pages` may use the scored rows as its workspace.
    codes : uint8, ``[num_host_pages, num_kv_heads, page_size, head_dim * bits // 8]``, device, optional
        The score of a page that is not full is undefined with them, and may be NaN.
    scale : float, optional, only with codes
        Of attention's logits: the score is the logarithm of the page's estimated mass, before it is normalised.
    pages : int32, ``[batch_size * num_kv_heads, num_listed]``, device, optional
        Logical pages to score, of each row its own; -1 at the end of a row for none.

    Returns
    -------
    out, or a new tensor with undefined values in those entries
        Largest logits are unscaled (no 1 / sqrt(head_dim)), as in the paper.

    Notes
    -----
    Source: Quest's bound, FreeKV (arXiv 2505.13109); kept in fp32, where the authors' engine rounds scores to bf16.
    """
    num_kv_heads, _, head_dim = summary.shape[1:]
    num_columns = batch.page_table.shape[1] if pages is None else pages.shape[1]
    shape = (len(batch.rows) * num_kv_heads, queries.shape[2], num_columns)
    scores = queries.new_empty(shape, dtype=torch.float32) if out is None else out
    rows = listed_rows(batch, half, flags)
    if len(rows) == 0:
        return scores
    request, head = rows // num_kv_heads, rows % num_kv_heads
    q = queries[batch.rows[request], head].float()
    if pages is None:
        host_pages = batch.page_table[request]
        is_page = torch.arange(num_columns, device=rows.device) < batch.num_pages[request, None]
    else:
        listed = pages[rows].long()
        host_pages, is_page = batch.page_table[request[:, None], listed.clamp(min=0)], listed >= 0
    records = host_pages * num_kv_heads + head[:, None]  # [n, num_columns]
    summary = summary.view(-1, 2, head_dim)  # of records
    if codes is None:
        q = torch.cat((q.clamp(max=0), q.clamp(min=0)), -1)  # the halves meet lo and hi
        bounds = decode_fp8(summary.index_select(0, records.flatten())).view(*records.shape, -1)
        of_rows = q @ bounds.transpose(-1, -2)
        if out is not None:
            of_rows = of_rows.where(is_page[:, None], out[rows, :, :num_columns])
        scores[rows, :, :num_columns] = of_rows
        return scores
    row, column = is_page.nonzero(as_tuple=True)
    record = records[is_page]
    for users in group_equal(record):  # requests that share a page have it decoded once
        for pairs in users.split(max(1, _PIECE // codes.shape[2:].numel())):
            own = row[pairs]
            of_users = q.index_select(0, own.flatten()).view(len(pairs), -1, head_dim)
            of_pages = (x.index_select(0, record[pairs[:, 0]]) for x in (summary, codes.flatten(0, 1)))
            scores[rows[own], :, column[pairs]] = _score_codes(of_users, *of_pages, scale).view(*own.shape, -1)
    return scores


def _score_codes(q: torch.Tensor, summary: torch.Tensor, codes: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Scores ``[n, num_queries]`` of n pages, each for queries of its own: q ``[n, num_queries, head_dim]``.

    Steps multiply the queries, which are fewer than the codes.
    """
    bits = codes.shape[-1] * 8 // q.shape[-1]
    low, step = code_steps(summary, bits)
    values, units = unpack_codes(codes, bits)
    logits = (q * (step * units)[:, None]) @ values.float()  # [n, num_queries, page_size]
    common = (q @ (low + step / 2)[:, :, None]).squeeze(-1)  # to all tokens of the page
    return logits.amax(-1) + common if scale is None else (scale * logits).logsumexp(-1) + scale * common


def group_equal(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Indices of equal values as rows, int64 ``[num_values, times]``; those that occur equally often together."""
    order = values.argsort()
    _, times = values[order].unique_consecutive(return_counts=True)
    for n in times.unique().tolist():
        yield order[times.repeat_interleave(times) == n].view(-1, n)


def listed_rows(batch: Batch, half: Half, flags: FlagList | None) -> torch.Tensor:
    """Rows (int64) over their budget when `half` is read; of `flags`, which are such rows, if given."""
    if flags is not None:
        return flags.rows[: int(flags.count)].long()
    is_over = batch.num_pages_at(half)[:, None] > batch.budget_pages
    return is_over.flatten().nonzero().flatten()


def list_rows(is_listed: torch.Tensor, rows: FlagList) -> None:
    """Write a list of rows, of bool ``[num_rows]``."""
    listed = is_listed.nonzero().flatten()
    rows.is_flagged.copy_(is_listed)
    rows.rows[: len(listed)] = listed.int()
    rows.count.fill_(len(listed))
