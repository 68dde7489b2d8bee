"""Attention on a CPU, in torch."""

from __future__ import annotations

from itertools import pairwise

import torch

from freekv_kernels import attend_ragged, attend_window, merge_states
from sglang_freekv.attention.base import DecodeAttention, PrefillAttention, indptr_of
from sglang_freekv.attention.prefix_pieces import PrefixPiece
from sglang_freekv.memory.geometry import Geometry


class TorchWindowAttention(DecodeAttention):
    """Decode attention in torch."""

    def run(
        self, q: torch.Tensor, block_kv: torch.Tensor, scale: float, kv_indptr: torch.Tensor | None = None
    ) -> torch.Tensor:
        num_rows = self.num_rows
        indptr = self.kv_indptr[: num_rows + 1] if kv_indptr is None else kv_indptr
        last_page_len = self.last_page_len[:num_rows]
        num_kv_heads = self.geometry.num_kv_heads
        out = attend_window(q.flatten(0, 1), block_kv, indptr, self.kv_indices, last_page_len, num_kv_heads, scale)
        return out.view(q.shape)


class TorchPrefillAttention(PrefillAttention):
    """Prefill attention in torch; the state is a list of (output in float32, log-sum-exp), one of each request."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def plan(self, extend_lens: list[int], groups: list[list[PrefixPiece]]) -> None:
        bounds = indptr_of(extend_lens).tolist()
        self._queries = [slice(*ends) for ends in pairwise(bounds)]
        self._groups = groups

    def attend_chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> list:
        return [attend_ragged(q[own], k[own], v[own], scale, causal=True) for own in self._queries]

    def attend_prefix(self, state: list, q: torch.Tensor, group: int, arena: torch.Tensor, scale: float) -> list:
        for piece in self._groups[group]:
            k, v = arena[piece.first_token :][: piece.num_tokens].unbind(1)
            part = attend_ragged(q[self._queries[piece.request]], k, v, scale, causal=False)
            state[piece.request] = merge_states(*state[piece.request], *part)
        return state

    def finish(self, state: list) -> torch.Tensor:
        return torch.cat([out for out, _ in state]).to(self.geometry.dtype)
