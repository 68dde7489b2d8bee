"""What a batch is planned from: SGLang's tables on the device, and what the host knows of them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DecodeInput(NamedTuple):
    """One decode step. Padding comes last."""

    rows: torch.Tensor  # int64 [batch_size], device: `req_pool_idx` of every running request; 0 for padding
    seq_lens: torch.Tensor  # int64 [batch_size], device: with the new token; 1 for padding
    slots: torch.Tensor  # int64 [num_requests], device: token slots of the new tokens, without padding
    req_to_token: torch.Tensor  # int32 [max_requests + 1, max_context], device: token slots, the new ones included
    rows_cpu: list[int]  # [num_requests], as `rows`, without padding
    seq_lens_cpu: list[int]  # [num_requests], as `seq_lens`, without padding


class ExtendInput(NamedTuple):
    """One extend batch; the requests' tokens are concatenated."""

    rows: torch.Tensor  # int64 [batch_size], device: `req_pool_idx` of the requests
    slots: torch.Tensor  # int64 [num_tokens], device: token slots of the chunk
    req_to_token: torch.Tensor  # int32 [max_requests + 1, max_context], device: token slots, the chunk's included
    rows_cpu: list[int]  # [batch_size], as `rows`
    prefix_lens: list[int]  # [batch_size], tokens that are in the host store already
    extend_lens: list[int]  # [batch_size], tokens of the chunk
    is_final: list[bool]  # [batch_size], whether the prompt ends with this chunk

    @property
    def lens(self) -> list[int]:
        """Tokens of each request, the chunk included."""
        return [prefix + extend for prefix, extend in zip(self.prefix_lens, self.extend_lens, strict=True)]

    @property
    def completed(self) -> list[int]:
        """Index of the requests whose prompt ends with the chunk; padding has none."""
        requests = enumerate(zip(self.is_final, self.rows_cpu, strict=True))
        return [i for i, (is_final, row) in requests if is_final and row]

    @property
    def last_tokens(self) -> list[int]:
        """Index, in the batch, of the last token of those."""
        return [sum(self.extend_lens[: i + 1]) - 1 for i in self.completed]
