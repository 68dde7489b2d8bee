"""Prefill attention in a sliding window on a GPU: a chunk behind the tokens that its first query still sees."""

from __future__ import annotations

from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

from sglang_freekv.attention.gpu import FlashInferPrefillAttention, logits_of, prefill_int_workspace_bytes
from sglang_freekv.attention.prefix_pieces import PrefixPiece
from sglang_freekv.memory.geometry import Geometry


class _Part(NamedTuple):
    """Requests next to each other in the batch, in one run."""

    tokens: slice  # of the batch
    tails: list[tuple[slice, slice]]  # of the arena, and of the batch, of each request; empty where none has a tail
    wrapper: BatchPrefillWithRaggedKVCacheWrapper


class FlashInferSlidingPrefillAttention(FlashInferPrefillAttention):
    """One causal run over the tail of a prefix and the chunk, laid out one after the other.

    A run over the tail alone cannot be masked: FlashInfer counts a window back from the last key. The state has the
    output and its log-sum-exp to base 2, and the chunk's keys and values, which wait for their tails.
    """

    def __init__(self, geometry: Geometry, workspace: torch.Tensor, *, sliding_window: int) -> None:
        super().__init__(geometry, workspace)
        self._logits = logits_of(geometry, sliding_window)

    def plan(self, extend_lens: list[int], groups: list[list[PrefixPiece]]) -> None:
        self._copied.synchronize()  # the last plan's copies from pinned memory
        bounds = list(accumulate(extend_lens, initial=0))
        size = prefill_int_workspace_bytes(self.geometry, bounds[-1], len(extend_lens), self._num_sms)
        if size > self._int_bytes:
            self._wrappers, self._int_bytes = [], 1 << size.bit_length()
        planned: dict[tuple, BatchPrefillWithRaggedKVCacheWrapper] = {}
        tokens = [slice(*ends) for ends in pairwise(bounds)]
        tails = {piece.request: piece for group in groups for piece in group}

        def part(requests: list[int]) -> _Part:
            pieces = [tails[request] for request in requests if request in tails]
            q_lens = [extend_lens[request] for request in requests]
            kv_lens = [tails[i].num_tokens + n if i in tails else n for i, n in zip(requests, q_lens, strict=True)]
            wrapper = self._planned(planned, q_lens, kv_lens, causal=True)
            laid_out = [slice(piece.first_token, piece.first_token + piece.num_tokens) for piece in pieces]
            own = [(rows, tokens[piece.request]) for rows, piece in zip(laid_out, pieces, strict=True)]
            return _Part(slice(bounds[requests[0]], bounds[requests[-1] + 1]), own, wrapper)

        alone = [request for request in range(len(extend_lens)) if request not in tails]
        self._alone = [part(run) for run in _runs(alone)]
        self._parts = [[part(run) for run in _runs([piece.request for piece in group])] for group in groups]
        self._copied.record()

    def attend_chunk(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for tokens, _, wrapper in self._alone:
            run = wrapper.forward_return_lse(
                q[tokens], k[tokens], v[tokens], causal=True, sm_scale=scale, **self._logits
            )
            out[tokens], lse[tokens] = run
        return out, lse, k, v

    def attend_prefix(
        self, state: tuple[torch.Tensor, ...], q: torch.Tensor, group: int, arena: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, ...]:
        out, lse, k, v = state
        for tokens, tails, wrapper in self._parts[group]:
            keys = torch.cat([x for rows, own in tails for x in (arena[rows, 0], k[own])])
            values = torch.cat([x for rows, own in tails for x in (arena[rows, 1], v[own])])
            run = wrapper.forward_return_lse(q[tokens], keys, values, causal=True, sm_scale=scale, **self._logits)
            out[tokens], lse[tokens] = run
        return state


def _runs(requests: list[int]) -> list[list[int]]:
    """Cut ascending numbers where one is missing."""
    numbered = groupby(enumerate(requests), lambda item: item[1] - item[0])
    return [[request for _, request in run] for _, run in numbered]
