"""Teacher-forced decode: a batch of texts that a runner reads token by token, each method from the same prompts.

The whole texts go through prefill once. A method then starts behind any context: it reads the prompt's last tokens
once more, in one chunk, so that its selector sees the queries that it chooses the first windows by, and decodes what
follows. These last tokens and all decoded ones have slots of their own, so the next method finds what the first found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.runner import decode_batch, extend_batch, forward

TAIL = 64  # tokens of a prompt that a method reads itself, whole pages
_CHUNK = 2048  # tokens of prefill
PAGE = 64  # tokens; the largest page, so a multiple of all


def num_slots(num_texts: int, length: int, num_steps: int) -> int:
    """Token slots that a reading needs, whole pages; the pool's own first page is not counted."""
    return num_texts * (_whole(length) + _whole(TAIL + num_steps))


class Work(NamedTuple):
    """Tokens that were processed, of all texts."""

    prefilled: int = 0
    decoded: int = 0


class Reading:
    """Texts of equal length, text i in row i + 1 of the request table.

    Parameters
    ----------
    runner
        SGLang's, whose pool has `num_slots` and a page more.
    texts : sequence of list of int
        Tokens.
    num_steps : int
        Of decode, at most, behind any context.
    """

    def __init__(self, runner, texts: Sequence[Sequence[int]], num_steps: int) -> None:
        self.runner, self.num_steps = runner, num_steps
        self.tokens = torch.tensor(texts, device=runner.device)  # [num_texts, length]
        num_texts, length = self.tokens.shape
        self.rows = torch.arange(1, num_texts + 1, device=runner.device)
        own = torch.arange(num_slots(num_texts, length, num_steps), device=runner.device) + PAGE
        own = own.view(num_texts, -1)
        self._prompt_slots, self._method_slots = own[:, : _whole(length)], own[:, _whole(length) :]

    def prefill(self) -> Iterator[Work]:
        """Read the texts; yields what it has read each time."""
        length = self.tokens.shape[1]
        table = self.runner.req_to_token_pool.req_to_token
        table[self.rows, :length] = self._prompt_slots[:, :length].to(table.dtype)
        for i, text in enumerate(self.tokens):
            for start in range(0, length, _CHUNK):
                chunk = text[start : start + _CHUNK]
                batch = extend_batch(self.runner, chunk, self.rows[i : i + 1], [start], [len(chunk)])
                forward(self.runner, batch, [i + 1], is_unfinished=True)
                yield Work(prefilled=len(chunk))

    def decode(self, context: int) -> Iterator[torch.Tensor]:
        """Read the last tokens of each text's first `context` once more, then decode what follows, teacher-forced.

        Yields
        ------
        model dtype, ``[num_texts, vocabulary]``
            Of each step: the logits of the token that `targets` has.
        """
        start, rows = context - TAIL, self.rows.tolist()
        table = self.runner.req_to_token_pool.req_to_token
        table[self.rows, :start] = self._prompt_slots[:, :start].to(table.dtype)
        table[self.rows, start : context + self.num_steps] = self._method_slots[:, : TAIL + self.num_steps].to(
            table.dtype
        )
        last = self.tokens[:, start:context].flatten()
        forward(self.runner, extend_batch(self.runner, last, self.rows, [start] * len(rows), [TAIL] * len(rows)), rows)
        for step in range(self.num_steps):
            lens = torch.full((len(rows),), context + step + 1)
            on_device = lens.to(self.runner.device)
            slots = table[self.rows, on_device - 1].long()
            tokens = self.tokens[:, context + step]
            yield forward(self.runner, decode_batch(self.runner, tokens, self.rows, on_device, lens, slots), rows)

    def targets(self, context: int, step: int) -> torch.Tensor:
        """The tokens that the text has where a step's logits are of: int64 ``[num_texts]``."""
        return self.tokens[:, context + step + 1]


def _whole(tokens: int) -> int:
    return -(-tokens // PAGE) * PAGE
