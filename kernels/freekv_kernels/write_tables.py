"""Write the tables of a decode step: snapshot what it works on, and open the pages that its tokens start."""

from __future__ import annotations

import torch

from freekv_kernels.tables import GROUP_PAGES, Batch, PairList, pairs_of


def write_tables(
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    slots: torch.Tensor,
    req_to_token: torch.Tensor,
    budget_pages: torch.Tensor,
    page_size: int,
    batch: Batch,
    last_page_len: torch.Tensor,
    windows: torch.Tensor,
    filled: torch.Tensor,
    opened: PairList,
) -> None:
    """Fill the tables of a batch, and prepare the pages whose first token this step writes.

    batch.page_table[b, p] = req_to_token[rows[b], p * page_size] // page_size  for p < num_pages[b]
    batch.num_pages = ceil(seq_lens / page_size), num_pages_next = ceil((seq_lens + 1) / page_size), 0 for padding
    batch.groups[b] = the host pages of logical pages 4i to 4i + 3, where the new token's page is 4i + 3, else -1
    last_page_len[b * num_kv_heads + h] = (seq_lens[b] - 1) % page_size + 1
    filled[slot // page_size] = slot % page_size + 1
    Where the new token starts a page: its pairs are listed in `opened`, and the page is added to the windows of the
    heads that are then within their budgets: windows[:, :, row, h, num_pages - 1] = num_pages - 1.

    Parameters
    ----------
    rows : int64, ``[batch_size]``, device
        `req_pool_idx` of every running request; 0 for padding.
    seq_lens : int64, ``[batch_size]``, device
        With the new token; 1 for padding.
    slots : int64, ``[<= batch_size]``, device
        Of the new tokens; padding has none, and gets slot 0.
    req_to_token : int32, ``[max_requests + 1, max_context]``, device
    budget_pages : int64, ``[max_requests + 1, num_kv_heads]``, device
    page_size : int, tokens
    batch : Batch
        Written, but for `step`. Entries of the page table past a request's pages keep their values: existing pages.
    last_page_len : int32, ``[>= batch_size * num_kv_heads]``, device
        Written.
    windows : int32, ``[2, num_layers, max_requests + 1, num_kv_heads, max_budget_pages]``, device, contiguous
    filled : int32, ``[num_host_pages]``, device
        Tokens written to each host page.
    opened : PairList
        Written: the pairs of the opened pages, and their count.

    Notes
    -----
    A copy, because the scheduler may rewrite `req_to_token` while the step runs.
    """
    num_kv_heads = windows.shape[3]
    is_real = rows > 0
    last = seq_lens - 1  # position of the new token
    last_page, in_last_page = last // page_size, (last % page_size + 1).int()
    batch.rows.copy_(rows)
    batch.slots[: len(slots)] = slots
    batch.slots[len(slots) :] = 0
    torch.mul(last_page + 1, is_real, out=batch.num_pages)
    torch.mul(seq_lens // page_size + 1, is_real, out=batch.num_pages_next)
    torch.index_select(budget_pages, 0, rows, out=batch.budget_pages)
    last_page_len[: len(rows) * num_kv_heads].view(-1, num_kv_heads).copy_(in_last_page[:, None])
    width = int(batch.num_pages.max())
    known = batch.page_table[:, :width]
    is_page = torch.arange(width, device=rows.device) < batch.num_pages[:, None]
    known.copy_((req_to_token[rows, : width * page_size : page_size] // page_size).where(is_page, known))
    members = last_page[:, None] - torch.arange(GROUP_PAGES - 1, -1, -1, device=rows.device)
    ends_group = is_real & (last_page % GROUP_PAGES == GROUP_PAGES - 1)
    batch.groups.copy_(batch.page_table.gather(1, members.clamp_(min=0)).where(ends_group[:, None], -1))

    pages = batch.slots // page_size  # a slot lies in its page as its token does
    filled[pages] = in_last_page
    is_opened = is_real & (in_last_page == 1)
    if not is_opened.any():  # most steps
        opened.count.zero_()
        return
    pairs = pairs_of(pages[is_opened], num_kv_heads).flatten()
    opened.pairs[: len(pairs)] = pairs
    opened.count.fill_(len(pairs))
    is_within = is_opened[:, None] & (batch.num_pages[:, None] <= batch.budget_pages)
    request, head = is_within.nonzero(as_tuple=True)
    last_page = last_page[request]
    windows[:, :, rows[request], head, last_page] = last_page.int()
