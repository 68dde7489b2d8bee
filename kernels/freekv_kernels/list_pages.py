"""List every page of each request: what a dense layer attends to."""

from __future__ import annotations

import torch

from freekv_kernels.tables import Batch, pairs_of


def list_pages(batch: Batch, num_kv_heads: int, kv_indptr: torch.Tensor, kv_indices: torch.Tensor) -> None:
    """Write the pairs of all pages of each request, in order; in a dense layer they are the numbers of the blocks.

    kv_indices[kv_indptr[b * num_kv_heads + h] + i] = page_table[b, i] * num_kv_heads + h,  for i < num_pages[b]

    Parameters
    ----------
    batch : Batch
        Padding reads pair 0.
    num_kv_heads : int
    kv_indptr : int32, ``[batch_size * num_kv_heads + 1]``, device
    kv_indices : int32, ``[>= kv_indptr[-1]]``, device
        Written.
    """
    pairs = pairs_of(batch.page_table, num_kv_heads).transpose(1, 2)  # [batch_size, num_kv_heads, max_pages]
    num_entries = kv_indptr.diff().view(-1, num_kv_heads, 1)
    is_entry = torch.arange(pairs.shape[-1], device=pairs.device) < num_entries
    pairs = pairs.where((batch.num_pages > 0)[:, None, None], 0)[is_entry]
    kv_indices[: len(pairs)] = pairs.int()
