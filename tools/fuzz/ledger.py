"""The test's own record of what every page of the host store holds."""

from __future__ import annotations

import numpy as np
import torch

from freekv_kernels.fp8 import encode_bounds
from sglang_freekv.algorithm.audit import audit_index
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.page_indexes import GroupedCodesIndex
from tools.fuzz.texts import Values

UNWRITTEN = -1


class Ledger:
    """Every write of a batch is repeated here; then the engine's memory must be the same, bit for bit, all over.

    Attributes
    ----------
    content : int64, ``[num_host_pages * page_size]``
        Hash of the token that each slot holds, with all tokens before it.
    filled : int32, ``[num_host_pages]``
        Tokens of each page's present owner.
    """

    def __init__(self, memory: KVMemory, values: Values) -> None:
        self.memory, self.values = memory, values
        self.page_size = memory.geometry.page_size
        self.content = np.full(memory.host.num_host_pages * self.page_size, UNWRITTEN)
        self.filled = memory.host.filled.numpy().copy()
        self._engine = {"kv": memory.host.kv.numpy(), "summaries": memory.index.summaries.numpy()}
        if memory.geometry.key_bits:
            self._engine["codes"] = memory.index.codes.numpy()
        self._has_group_bounds = isinstance(memory.index, GroupedCodesIndex)
        self._copies = {name: tensor.copy() for name, tensor in self._engine.items()}

    def write(self, slots: np.ndarray, hashes: np.ndarray, groups: np.ndarray) -> None:
        """A batch has run: its tokens are in these slots, in order within a page, and end these groups of pages."""
        pages, offsets = slots // self.page_size, slots % self.page_size
        self.content[slots] = hashes
        self.filled[pages] = offsets + 1
        self._copies["kv"][pages, :, :, :, offsets] = self.values.kv(hashes)
        touched = np.unique(pages)
        self._check_summaries(touched, groups)
        full = touched[self.filled[touched] == self.page_size]
        if len(full):
            audit_index(self.memory, torch.from_numpy(full), torch.from_numpy(groups))  # and their codes
        for name in self._engine.keys() - {"kv"}:
            self._copies[name][:, touched] = self._engine[name][:, touched]

    def _check_summaries(self, pages: np.ndarray, groups: np.ndarray) -> None:
        keys = self._copies["kv"][pages, :, :, 0]  # [n, num_layers, num_kv_heads, page_size, head_dim]
        is_written = (np.arange(self.page_size) < self.filled[pages, None])[:, None, None, :, None]
        low, high = (reduce(3, initial=x, where=is_written) for reduce, x in ((keys.min, np.inf), (keys.max, -np.inf)))
        if self._has_group_bounds:
            keys = self._copies["kv"][groups, :, :, 0]  # [n, 4, num_layers, num_kv_heads, page_size, head_dim]
            last = np.searchsorted(pages, groups[:, -1])
            low[last], high[last] = keys.min((1, 4)), keys.max((1, 4))
        bounds = encode_bounds(torch.from_numpy(low), torch.from_numpy(high)).numpy()
        is_wrong = self._engine["summaries"][:, pages].swapaxes(0, 1) != bounds
        assert not is_wrong.any(), f"host store: wrong summary of pages {np.unique(pages[is_wrong.nonzero()[0]])}"

    def check(self) -> None:
        """Nothing is where nobody wrote it; what was written is still there."""
        assert np.array_equal(self.memory.host.filled.numpy(), self.filled), "filled: a page counts wrong tokens"
        for name, engine in self._engine.items():
            differs = engine.view(np.uint8) != self._copies[name].view(np.uint8)
            if differs.any():
                page_axis = 0 if name == "kv" else 1
                pages = np.unique(differs.nonzero()[page_axis]).tolist()
                raise AssertionError(f"host store: {name} of pages {pages} is not what was written")
