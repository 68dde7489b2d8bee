"""Records of the host store: the K and V of one (page, layer, KV head), as a codec writes and reads them.

Every op that touches the host store goes through here, and its kernel through `records_triton`. A codec decides what a
record looks like; blocks on the device always hold the model's own numbers, those that the record reads back as.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


def records_at(host_kv: torch.Tensor, pages: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Copies of the records of pairs: ``[n, *record]``.

    Parameters
    ----------
    host_kv : ``[num_host_pages, num_kv_heads, *record]``, CPU
        One layer of the host store: a strided view of whole records.
    pages, heads : int64, ``[n]``
    """
    num_host_pages, num_kv_heads, *record = host_kv.shape
    between_pages, between_heads, *strides = host_kv.stride()
    records_per_page = between_pages // between_heads  # of all layers
    # As one list of records, of which index_select copies whole runs.
    shape = ((num_host_pages - 1) * records_per_page + num_kv_heads, *record)
    records = host_kv.as_strided(shape, (between_heads, *strides))
    return records.index_select(0, pages * records_per_page + heads)


class Codec(ABC):
    """One format of records. Kernels know it by its name."""

    name: str

    @abstractmethod
    def record_shape(self, page_size: int, head_dim: int) -> tuple[int, ...]:
        """Elements of a record."""

    @abstractmethod
    def dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Of the elements."""

    @abstractmethod
    def write_tokens(
        self, host_kv: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        """Write tokens to all heads' records, and return what they read back as.

        Parameters
        ----------
        host_kv : ``[num_host_pages, num_kv_heads, *record]``, CPU
        pages, offsets : int64, ``[n]``
            Host page of each token, and its place there.
        kv : model dtype, ``[n, num_kv_heads, 2, head_dim]``

        Returns
        -------
        model dtype, as `kv`
        """

    @abstractmethod
    def decode(self, records: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Read records ``[..., *record]``: `dtype`, ``[..., 2, page_size, head_dim]``."""

    def decode_keys(self, host_kv: torch.Tensor, pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Read the keys of whole pages: `dtype`, ``[n, num_kv_heads, page_size, head_dim]``."""
        return self.decode(host_kv[pages], dtype)[:, :, 0]


class Plain(Codec):
    """The model's own numbers, head-major: K of all tokens, then V. A recall is a straight copy."""

    name = "plain"

    def record_shape(self, page_size: int, head_dim: int) -> tuple[int, ...]:
        return (2, page_size, head_dim)

    def dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype

    def write_tokens(
        self, host_kv: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        host_kv[pages, :, :, offsets] = kv
        return kv

    def decode(self, records: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return records

    def decode_keys(self, host_kv: torch.Tensor, pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return host_kv[pages, :, 0]


PLAIN = Plain()
