"""Attention as the algorithm asks for it: of decode over listed blocks, of prefill over a chunk and its prefixes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from sglang_freekv.attention.prefix_pieces import PrefixPiece
from sglang_freekv.memory.geometry import Geometry


def indptr_of(lens: list[int]) -> torch.Tensor:
    """Where each of several runs starts, and where the last one ends: int32 ``[len(lens) + 1]``, CPU."""
    return torch.nn.functional.pad(torch.tensor(lens).cumsum(0), (1, 0)).int()


class DecodeAttention(ABC):
    """Attention of one new token per request to listed blocks; row = request * num_kv_heads + head.

    Per step `plan`, which writes `kv_indptr`; per layer `run`, before which the caller writes `kv_indices`. The caller
    also writes `last_page_len`, at any time before `run`: no plan depends on it, and none changes it.

    Parameters
    ----------
    geometry : Geometry
    max_requests : int
        Most requests of a batch, padding included.
    max_pages : int
        Most pages that a row reads.
    device : str
    sliding_window : int, optional
        Tokens that a row attends to at most, the latest ones of those that it lists. By default all.

    Attributes
    ----------
    kv_indptr : int32, ``[max_requests * num_kv_heads + 1]``, device
        Where the blocks of each row start in `kv_indices`.
    kv_indices : int32, ``[max_requests * num_kv_heads * max_pages]``, device
    last_page_len : int32, ``[max_requests * num_kv_heads]``, device
        Tokens in the last block of each row.
    """

    def __init__(
        self,
        geometry: Geometry,
        max_requests: int,
        max_pages: int,
        device: str = "cpu",
        *,
        sliding_window: int | None = None,
    ) -> None:
        self.geometry, self.max_requests, self.max_pages = geometry, max_requests, max_pages
        self.sliding_window = sliding_window
        num_rows = max_requests * geometry.num_kv_heads
        self.kv_indptr = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self.kv_indices = torch.zeros(num_rows * max_pages, dtype=torch.int32, device=device)
        self.last_page_len = torch.ones(num_rows, dtype=torch.int32, device=device)
        self._num_pages: list[int] = []

    @property
    def num_rows(self) -> int:
        """Rows of the planned batch."""
        return len(self._num_pages)

    def plan(self, num_pages: list[int]) -> None:
        """Prepare the runs of a step, eager or in a CUDA graph; returns at once where the last plan still holds.

        Parameters
        ----------
        num_pages : list of int, ``[batch_size * num_kv_heads]``
            Pages that each row reads at most, at least 1, which is also what padding reads.

        Raises
        ------
        ValueError
            If the batch or a row is larger than what the page lists hold.
        """
        if num_pages == self._num_pages:
            return
        num_requests = len(num_pages) // self.geometry.num_kv_heads
        if num_requests > self.max_requests or not 1 <= min(num_pages) <= max(num_pages) <= self.max_pages:
            raise ValueError(
                f"FreeKV: attention was planned for {num_requests} requests whose heads read {min(num_pages)} to "
                f"{max(num_pages)} pages; it was set up for at most {self.max_requests} of 1 to {self.max_pages}"
            )
        indptr = indptr_of(num_pages)
        if self.kv_indptr.is_cuda:
            indptr = indptr.pin_memory()
        self._num_pages = []  # a plan that fails holds for nothing
        self.kv_indptr[: len(indptr)].copy_(indptr, non_blocking=True)
        self._plan_rows(len(num_pages), indptr)
        self._num_pages = list(num_pages)

    def _plan_rows(self, num_rows: int, indptr: torch.Tensor) -> None:  # noqa: B027  a hook: torch has nothing to plan
        """Plan the kernel for what `kv_indptr` now holds; `indptr` is its copy on the host."""

    @abstractmethod
    def run(
        self,
        q: torch.Tensor,
        block_kv: torch.Tensor,
        scale: float,
        kv_indptr: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend in one layer.

        Parameters
        ----------
        q : model dtype, ``[batch_size, num_kv_heads, group_size, head_dim]``, device
        block_kv : model dtype, ``[num_blocks, 2, page_size, head_dim]``, device
        scale : float, of the logits
        kv_indptr : int32, ``[num_rows + 1]``, device, optional
            Instead of the planned one, where rows of this layer read fewer pages than planned, at least one.
        sinks : float32, ``[num_kv_heads, group_size]``, device, optional
            Logits without a value, one more in each softmax.

        Returns
        -------
        model dtype, ``[batch_size, num_kv_heads, group_size, head_dim]``
        """


class PrefillAttention(ABC):
    """Attention of a chunk to itself, then to its prefixes, group by group from the arena.

    Of a layer with a sliding window these are the tokens that the chunk's first query still sees, whole in one group.

    Per batch `plan`; per layer `attend_chunk`, `attend_prefix` for each group, `finish`. The state that they hand on is
    the output so far and its log-sum-exp, as the implementation keeps them; it is consumed by the next call.
    """

    @abstractmethod
    def plan(self, extend_lens: list[int], groups: list[list[PrefixPiece]]) -> None:
        """Prepare for a batch.

        Parameters
        ----------
        extend_lens : list of int, ``[batch_size]``
            New tokens of each request, at least 1.
        groups : list of list of PrefixPiece
            What the arena holds, one group after the other; at most one piece of a request in each.
        """

    @abstractmethod
    def attend_chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Any:
        """Causal attention of each request's new tokens to themselves; returns the state.

        Parameters
        ----------
        q : model dtype, ``[num_tokens, num_qo_heads, head_dim]``, device
        k, v : model dtype, ``[num_tokens, num_kv_heads, head_dim]``, device
        scale : float, of the logits
        """

    @abstractmethod
    def attend_prefix(self, state: Any, q: torch.Tensor, group: int, arena: torch.Tensor, scale: float) -> Any:
        """Attend to the pieces of a group as well; returns the new state.

        Parameters
        ----------
        q : model dtype, ``[num_tokens, num_qo_heads, head_dim]``, device
        group : int
            Index in the planned groups.
        arena : model dtype, ``[arena_tokens, 2, num_kv_heads, head_dim]``, device
        scale : float, of the logits
        """

    @abstractmethod
    def finish(self, state: Any, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Return the output: model dtype, ``[num_tokens, num_qo_heads, head_dim]``.

        `sinks` (float32, ``[num_qo_heads]``, device) are logits without a value, one more in each softmax.
        """
