"""A batch: planned, and later run through FreeKV's attention backend and held against what its texts say."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from freekv_kernels import GROUP_PAGES, Half
from tools.fuzz.attention import check_decode, check_prefill
from tools.fuzz.setups import PAGE_SIZE

if TYPE_CHECKING:
    from torch.nn import ModuleList

    from sglang_freekv.serving.attention_backend import FreeKVAttentionBackend
    from tools.fuzz.ledger import Ledger
    from tools.fuzz.scheduler import Life


@dataclass(frozen=True)
class Member:
    """Tokens first to last - 1 of a request; `is_answered` where the model's next token is the request's."""

    life: Life
    first: int
    last: int
    is_answered: bool


class Batch:
    """One forward pass. To build it is to plan it: the backend has copied what it needs of SGLang's tables."""

    def __init__(
        self,
        backend: FreeKVAttentionBackend,
        layers: ModuleList,
        ledger: Ledger,
        batch: ScheduleBatch,
        members: list[Member],
        slots: torch.Tensor,
        mode: ForwardMode,
    ) -> None:
        self._backend, self._layers, self._ledger = backend, layers, ledger
        self.members, self.mode = members, mode
        self.slots = slots.numpy()
        self.rows = [member.life.req.req_pool_idx for member in members]
        table = backend.req_to_token_pool.req_to_token.numpy()
        self.pages = [table[row, : m.last : PAGE_SIZE] // PAGE_SIZE for row, m in zip(self.rows, members, strict=True)]
        backend.begin_batch(batch)
        backend.init_forward_metadata(
            SimpleNamespace(
                forward_mode=mode,
                batch_size=len(members),
                rids=[member.life.req.rid for member in members],
                req_pool_indices=torch.tensor(self.rows),
                out_cache_loc=slots,
                seq_lens=batch.seq_lens,
                seq_lens_cpu=batch.seq_lens_cpu,
                extend_prefix_lens_cpu=[member.first for member in members],
                extend_seq_lens_cpu=[member.last - member.first for member in members],
            )
        )

    def run(self) -> None:
        """All layers, and the record of what they wrote."""
        values = self._ledger.values
        hashes = np.concatenate([m.life.text.hashes[m.first : m.last] for m in self.members])
        kv = torch.from_numpy(values.kv(hashes))  # [n, num_layers, num_kv_heads, 2, head_dim]
        queries = [values.queries(m.life.text, m.first, m.last) for m in self.members]
        q = torch.from_numpy(np.concatenate(queries))  # [n, num_layers, num_kv_heads, group_size, head_dim]
        forward = self._backend.forward_extend if self.mode.is_extend() else self._backend.forward_decode
        for layer, attention in enumerate(self._layers):
            k, v = kv[:, layer].unbind(2)  # [n, num_kv_heads, head_dim]
            out = forward(q[:, layer].flatten(1), k, v, attention, None)
            self._check_outputs(layer, out.view(q[:, layer].shape).numpy(), attention.scaling)
        self._backend.end_batch(self.mode)
        self._ledger.write(self.slots, hashes, self._ended_groups())

    def _ended_groups(self) -> np.ndarray:
        """Host pages of the groups of pages whose last token the batch writes: ``[n, GROUP_PAGES]``."""
        groups = [
            pages[first : first + GROUP_PAGES]
            for member, pages in zip(self.members, self.pages, strict=True)
            for first in range(0, len(pages), GROUP_PAGES)
            if member.first < (first + GROUP_PAGES) * PAGE_SIZE <= member.last
        ]
        return np.array(groups, dtype=np.int64).reshape(-1, GROUP_PAGES)

    def _check_outputs(self, layer: int, out: np.ndarray, scale: float) -> None:
        values, first = self._ledger.values, 0
        for index, member in enumerate(self.members):
            last = first + member.last - member.first
            text = member.life.text
            if self.mode.is_extend():
                check_prefill(values, text, layer, member.first, member.last, out[first:last], scale)
            else:
                windows = self.front_windows(layer, index)
                check_decode(values, text, layer, member.last, windows, out[first], scale)
            first = last

    def front_windows(self, layer: int, index: int) -> np.ndarray:
        """Logical pages that a decode step reads of a member: ``[num_kv_heads, n]``, -1 padded."""
        memory = self._backend.memory
        if not memory.kinds[layer].selects:
            return np.tile(np.arange(len(self.pages[index])), (memory.geometry.num_kv_heads, 1))
        (half,) = Half.FRONT.indices(int(memory.blocks.step))
        window = memory.windows.pages[half, layer, self.rows[index]].numpy()
        return window[:, : (window >= 0).sum(1).max()]
