"""Requests in the middle of decoding in SGLang's runner, without the prefill that would have brought them there.

Where they need more tokens than the pool has, they share its pages, see `mid_decode`; the record says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu.decode_model import WALK_TOKENS
from benchmarks.gpu.mid_decode import fill_host_store, map_pages, restart, start_rows
from benchmarks.runner import decode_batch, forward

__all__ = ["Requests", "fill_host_store", "give_first_windows", "make_requests", "restart"]


@dataclass
class Requests:
    """A batch that decodes one token per step; row 0 of the request table is SGLang's padding."""

    runner: object
    rows: torch.Tensor  # int64 [batch_size]
    lengths: torch.Tensor  # int64 [batch_size], CPU: before the next step
    seq_lens: torch.Tensor  # the same on the device
    tokens: torch.Tensor  # int64 [batch_size], of the next step
    shares_pages: bool

    def step(self) -> None:
        """Decode one token of every request; the host does not wait for it."""
        runner = self.runner
        slots = runner.req_to_token_pool.req_to_token[self.rows, self.seq_lens].long()
        self.lengths, self.seq_lens = self.lengths + 1, self.seq_lens + 1
        tokens, self.tokens = self.tokens, (self.tokens + 1) % WALK_TOKENS
        batch = decode_batch(runner, tokens, self.rows, self.seq_lens, self.lengths, slots)
        forward(runner, batch, range(1, len(self.rows) + 1))


def make_requests(runner, batch_size: int, context: int, max_steps: int, num_pages: int) -> Requests:
    """Requests in rows 1, 2, ... of the runner's request table, on pages 1 to `num_pages`: see `map_pages`."""
    device, table = runner.device, runner.req_to_token_pool.req_to_token
    lengths, shares_pages = map_pages(table, batch_size, context, max_steps, num_pages)
    rows = torch.arange(1, batch_size + 1, device=device)
    tokens = torch.randint(WALK_TOKENS, (batch_size,), device=device)
    return Requests(runner, rows, lengths, lengths.to(device), tokens, shares_pages)


def give_first_windows(requests: Requests) -> None:
    """First windows, by a random query, and their blocks: see `start_rows`."""
    prefill, table = requests.runner.attn_backend.prefill, requests.runner.req_to_token_pool.req_to_token
    start_rows(prefill.memory, prefill.selectors, table, requests.rows, requests.seq_lens)
