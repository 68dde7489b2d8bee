"""Lay pages of the host store out as tokens, for prefill attention."""

from __future__ import annotations

import torch

from freekv_kernels.tables import PageStore


def fill_arena(arena: torch.Tensor, store: PageStore, pages: torch.Tensor) -> None:
    """Convert pages from head-major to NHD, in the order given.

    arena[i * page_size + offset, 0 | 1, h] = what the record of (pages[i], h) reads back as, at offset

    Parameters
    ----------
    arena : model dtype, ``[>= num_pages * page_size, 2, num_kv_heads, head_dim]``, device
        One half of the prefill arena; tokens past the pages are left alone.
    store : PageStore
        Of one layer. A resident block equals its host page in the written tokens, so it may be read instead: it is
        nearer.
    pages : int64, ``[num_pages]``, device
        Host pages.
    """
    tokens = store.codec.decode(store.host_kv[pages], arena.dtype).permute(0, 3, 2, 1, 4).flatten(0, 1)
    arena[: len(tokens)] = tokens
