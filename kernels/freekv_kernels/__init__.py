"""The operations of KV retrieval, one file each: a torch reference, which is the specification, and a Triton kernel
beside it (`<op>_triton.py`).

This package imports torch and Triton only, never SGLang. Ops work on one layer unless they say otherwise; a row is one
(request, KV head): request * num_kv_heads + head. Blocks, and records of the plain codec, are
`[2, page_size, head_dim]`, K first, head-major (HND).
"""

from collections.abc import Callable
from typing import NamedTuple

from freekv_kernels.append_tokens import append_tokens
from freekv_kernels.apportion_pages import apportion_pages
from freekv_kernels.attend_ragged import attend_ragged, merge_states
from freekv_kernels.attend_window import attend_window
from freekv_kernels.claim_blocks import claim_blocks
from freekv_kernels.codecs import CODECS
from freekv_kernels.compare_queries import compare_queries
from freekv_kernels.correct_windows import correct_windows
from freekv_kernels.encode_pages import encode_pages
from freekv_kernels.fetch_blocks import fetch_blocks
from freekv_kernels.fill_arena import fill_arena
from freekv_kernels.forget_blocks import forget_blocks
from freekv_kernels.list_candidates import list_candidates, list_width
from freekv_kernels.list_pages import list_pages
from freekv_kernels.logits import add_sinks, cap_logits
from freekv_kernels.lookup_blocks import lookup_blocks, lookup_pairs, window_pairs
from freekv_kernels.recall_blocks import recall_blocks
from freekv_kernels.records import PLAIN, Codec
from freekv_kernels.score_pages import score_pages
from freekv_kernels.select_pages import select_pages
from freekv_kernels.share_pages import share_pages
from freekv_kernels.store_pages import store_pages
from freekv_kernels.summarize_pages import summarize_pages
from freekv_kernels.tables import (
    GROUP_PAGES,
    Batch,
    BlockTables,
    Claim,
    Count,
    FlagList,
    Half,
    MissList,
    PageStore,
    PairList,
    pairs_of,
)
from freekv_kernels.write_tables import write_tables


class Ops(NamedTuple):
    """The ops that have a kernel. Both implementations have the signatures and the contracts of the references."""

    write_tables: Callable[..., None]
    forget_blocks: Callable[..., None]
    list_pages: Callable[..., None]
    append_tokens: Callable[..., None]
    list_candidates: Callable[..., None]
    score_pages: Callable
    share_pages: Callable[..., None]
    correct_windows: Callable[..., None]
    apportion_pages: Callable[..., None]
    select_pages: Callable[..., None]
    lookup_blocks: Callable[..., None]
    claim_blocks: Callable[..., None]
    recall_blocks: Callable[..., None]
    fetch_blocks: Callable[..., None]
    store_pages: Callable[..., None]
    encode_pages: Callable[..., None]
    fill_arena: Callable[..., None]


REFERENCE = Ops(
    write_tables,
    forget_blocks,
    list_pages,
    append_tokens,
    list_candidates,
    score_pages,
    share_pages,
    correct_windows,
    apportion_pages,
    select_pages,
    lookup_blocks,
    claim_blocks,
    recall_blocks,
    fetch_blocks,
    store_pages,
    encode_pages,
    fill_arena,
)


def triton_ops() -> Ops:
    """The Triton kernels; imported here, as a CPU has no use for them."""
    from importlib import import_module

    return Ops(*(getattr(import_module(f"freekv_kernels.{op}_triton"), op) for op in Ops._fields))


__all__ = [
    "CODECS",
    "GROUP_PAGES",
    "PLAIN",
    "REFERENCE",
    "Batch",
    "BlockTables",
    "Claim",
    "Codec",
    "Count",
    "FlagList",
    "Half",
    "MissList",
    "Ops",
    "PageStore",
    "PairList",
    "add_sinks",
    "append_tokens",
    "apportion_pages",
    "attend_ragged",
    "attend_window",
    "cap_logits",
    "claim_blocks",
    "compare_queries",
    "correct_windows",
    "encode_pages",
    "fetch_blocks",
    "fill_arena",
    "forget_blocks",
    "list_candidates",
    "list_pages",
    "list_width",
    "lookup_blocks",
    "lookup_pairs",
    "merge_states",
    "pairs_of",
    "recall_blocks",
    "score_pages",
    "select_pages",
    "share_pages",
    "store_pages",
    "summarize_pages",
    "triton_ops",
    "window_pairs",
    "write_tables",
]
