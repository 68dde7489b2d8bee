"""Page indexes: the bytes on the device that pages are chosen by, of every page of the host store."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from freekv_kernels import Ops, PageStore
from sglang_freekv.memory.geometry import Geometry


class PageIndex(ABC):
    """What a selector reads of a page instead of its keys. It belongs to the host page: who shares one shares both.

    `seal` and `audit` are about the layers that `summary` is kept of, or would be.
    """

    @staticmethod
    @abstractmethod
    def page_bytes(geometry: Geometry) -> int:
        """Device bytes of one host page, all layers and heads; the memory plan and the doctor ask for it."""

    @abstractmethod
    def summary(self, number: int) -> torch.Tensor | None:
        """What writes to a layer's pages keep up to date by themselves: see `PageStore.summary`; None: nothing."""

    def encoded_by_append(self, number: int, groups: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What `append_tokens` writes of pages that its tokens fill, in a layer: its `codes` and `groups`.

        Without codes a decode step calls `seal`, as a prefill does.

        Parameters
        ----------
        groups : int64, ``[batch_size, GROUP_PAGES]``, device
            As those of `seal`.
        """
        return None, None

    @abstractmethod
    def seal(self, ops: Ops, number: int, store: PageStore, slots: torch.Tensor, groups: torch.Tensor) -> None:
        """Pages that end with one of these slots (int64, device; others are not full yet) are full, in a layer.

        `groups` (int64, ``[n, GROUP_PAGES]``, device) are the host pages of the group that ends with each slot's page,
        -1 where none does.
        """

    @abstractmethod
    def audit(
        self, number: int, store: PageStore, pages: torch.Tensor, filled: torch.Tensor, groups: torch.Tensor
    ) -> None:
        """Raise RuntimeError where the index of one of these pages is not what its keys in the host store say.

        Parameters
        ----------
        number : int
            Of the layer.
        pages : int64, ``[n]``, CPU
            Host pages with at least one token.
        filled : int32, ``[n]``, CPU
            Their tokens.
        groups : int64, ``[num_groups, GROUP_PAGES]``, CPU
            Host pages of the groups that end with one of `pages`, when that is full.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Device bytes."""
