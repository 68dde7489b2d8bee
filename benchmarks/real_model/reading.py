"""Teacher-forced decode: a batch of texts that a runner reads token by token, each method from the same prompts.

The whole texts go through prefill once. A method then starts behind any context: it reads the prompt's last tokens
once more, in one chunk, so that its selector sees the queries that it chooses the first windows by, and decodes what
follows. These last tokens and all decoded ones have slots of their own, so the next method finds what the first found.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.real_model.job import PAGE, TAIL, Job, Work, whole_pages
from benchmarks.runner import decode_batch, extend_batch, forward

_CHUNK = 2048  # tokens of prefill


class Reading:
    """Texts of equal length, text i in row i + 1 of the request table.

    Parameters
    ----------
    runner
        SGLang's, with a pool of the job's slots.
    job : Job
    """

    def __init__(self, runner, job: Job) -> None:
        self.runner, self.num_steps = runner, job.num_steps
        self.tokens = torch.tensor(job.texts, device=runner.device)  # [num_texts, length]
        num_texts, length = self.tokens.shape
        self.rows = torch.arange(1, num_texts + 1, device=runner.device)
        own = torch.arange(PAGE, job.num_slots, device=runner.device).view(num_texts, -1)
        self._prompt_slots, self._method_slots = own[:, : whole_pages(length)], own[:, whole_pages(length) :]

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
