"""Attention on a CPU, in torch."""

from __future__ import annotations

from itertools import pairwise

import torch

from freekv_kernels import add_sinks, attend_ragged, attend_window, merge_states
from sglang_freekv.attention.base import DecodeAttention, PrefillAttention, indptr_of
from sglang_freekv.attention.prefix_pieces import PrefixPiece
from sglang_freekv.memory.geometry import Geometry


class TorchWindowAttention(DecodeAttention):
    """Decode attention in torch."""

    def run(
        self,
        q: torch.Tensor,
        block_kv: torch.Tensor,
        scale: float,
        kv_indptr: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        num_rows = self.num_rows
        indptr = self.kv_indptr[: num_rows + 1] if kv_indptr is None else kv_indptr
        last_page_len = self.last_page_len[:num_rows]
        rows = (indptr, self.kv_indices, last_page_len, self.geometry.num_kv_heads)
        own = (self.sliding_window, self.geometry.logit_cap, sinks)
        return attend_window(q.flatten(0, 1), block_kv, *rows, scale, *own).view(q.shape)


class TorchPrefillAttention(PrefillAttention):
    """Prefill attention in torch; the state is a list of (output in float32, log-sum-exp), one of each request."""

    def __init__(self, geometry: Geometry, sliding_window: int | None = None) -> None:
        self.geometry, self.sliding_window = geometry, sliding_window

    def plan(self, extend_lens: list[int], groups: list[list[PrefixPiece]]) -> None:
        bounds = indptr_of(extend_lens).tolist()
        self._queries = [slice(*ends) for ends in pairwise(bounds)]
        self._groups = groups

    def attend_chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> list:
        return [self._attend(q[own], k[own], v[own], scale, causal=True) for own in self._queries]

    def attend_prefix(self, state: list, q: torch.Tensor, group: int, arena: torch.Tensor, scale: float) -> list:
        for piece in self._groups[group]:
            k, v = arena[piece.first_token :][: piece.num_tokens].unbind(1)
            part = self._attend(q[self._queries[piece.request]], k, v, scale, causal=False)
            state[piece.request] = merge_states(*state[piece.request], *part)
        return state

    def finish(self, state: list, sinks: torch.Tensor | None = None) -> torch.Tensor:
        out, lse = (torch.cat(parts) for parts in zip(*state, strict=True))
        return (out if sinks is None else add_sinks(out, lse, sinks)).to(self.geometry.dtype)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return attend_ragged(q, k, v, scale, causal, self.sliding_window if causal else None, self.geometry.logit_cap)


class TorchSlidingPrefillAttention(TorchPrefillAttention):
    """Prefill attention in a sliding window; the state has the keys and values of a chunk in place of its attention,
    where these wait for the tokens before them.
    """

    def plan(self, extend_lens: list[int], groups: list[list[PrefixPiece]]) -> None:
        super().plan(extend_lens, groups)
        self._has_tail = {piece.request for group in groups for piece in group}

    def attend_chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> list:
        return [
            (k[own], v[own]) if request in self._has_tail else self._attend(q[own], k[own], v[own], scale, causal=True)
            for request, own in enumerate(self._queries)
        ]

    def attend_prefix(self, state: list, q: torch.Tensor, group: int, arena: torch.Tensor, scale: float) -> list:
        for piece in self._groups[group]:
            tail = arena[piece.first_token :][: piece.num_tokens].unbind(1)
            k, v = (torch.cat(parts) for parts in zip(tail, state[piece.request], strict=True))
            state[piece.request] = self._attend(q[self._queries[piece.request]], k, v, scale, causal=True)
        return state
