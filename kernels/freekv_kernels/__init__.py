"""The operations of KV retrieval, one file each, as torch references: the specification of every kernel.

This package imports torch only, never SGLang. All ops work on one layer; a row is one (request, KV head).
Pages are `[..., 2, page_size, head_dim]` records, K first, head-major (HND).
"""

from freekv_kernels.append_tokens import append_tokens
from freekv_kernels.attend_ragged import attend_ragged, merge_states
from freekv_kernels.attend_window import attend_window
from freekv_kernels.claim_blocks import claim_blocks
from freekv_kernels.compare_queries import compare_queries
from freekv_kernels.fill_arena import fill_arena
from freekv_kernels.recall_blocks import recall_blocks
from freekv_kernels.score_pages import score_pages
from freekv_kernels.select_pages import select_pages
from freekv_kernels.store_tokens import store_tokens
from freekv_kernels.summarize_pages import summarize_pages

__all__ = [
    "append_tokens",
    "attend_ragged",
    "attend_window",
    "claim_blocks",
    "compare_queries",
    "fill_arena",
    "merge_states",
    "recall_blocks",
    "score_pages",
    "select_pages",
    "store_tokens",
    "summarize_pages",
]
