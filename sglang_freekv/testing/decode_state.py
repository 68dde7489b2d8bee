"""The engine's own tensors in the middle of a decode step of a given size: what kernels are called with."""

from __future__ import annotations

import torch

from freekv_kernels import FlagList, Half, MissList, PairList, list_width, pairs_of, window_pairs
from freekv_kernels.fp8 import decode_fp8, encode_bounds
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry, num_pages_of
from sglang_freekv.memory.kv_memory import KVMemory

CHUNK_TOKENS = 8192  # of prefill
CANDIDATES = 5  # pages scored for each one selected, with two levels
LAYER = 1  # not the first: its counters are at addresses that are multiples of 4 bytes only, as in most layers


class DecodeState:
    """A decode step in which every request is over its budget, and a prefill chunk of the first request.

    Values that no kernel looks at, as most of those in the host store, are undefined.

    Parameters
    ----------
    geometry : Geometry
        At least two layers, and codes of keys.
    batch_size : int
    context_tokens : int
        Of each request, a multiple of the page size; the last pages are filled differently.
    config : FreeKVConfig
    max_context : int, tokens
        Bounds the page table, and with it the grids.
    device : str
    miss_rate, flag_rate : float
        Share of the pages of a window that have no block, and of the rows whose query has moved.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        batch_size: int,
        context_tokens: int,
        config: FreeKVConfig,
        max_context: int,
        device: str,
        miss_rate: float = 0.1,
        flag_rate: float = 0.2,
    ) -> None:
        g = self.geometry = geometry
        self.batch_size, self.context_tokens, self.device = batch_size, context_tokens, device
        self.config, self.miss_rate = config, miss_rate
        self.num_rows = batch_size * g.num_kv_heads
        self.num_pages = num_pages_of(context_tokens, g.page_size)
        self.memory = KVMemory(
            g,
            config,
            num_host_pages=1 + batch_size * self.num_pages,
            num_blocks=2 * self.num_rows * (config.max_budget_tokens // g.page_size),
            max_requests=batch_size,
            max_context=max_context,
            device=device,
        )
        self.layer, self.sizes = self.memory.layers[LAYER], self.memory.sizes
        self.width = self.sizes.max_budget
        self._begin(max_context)
        self._fill_keys()
        self.is_flagged = torch.rand(self.num_rows, device=device) < flag_rate
        self.back_pairs, self.front_pairs = self._write_windows(), self._write_windows()
        self.kv_indptr = torch.arange(self.num_rows + 1, dtype=torch.int32, device=device) * self.width
        self.kv_indices = torch.zeros(self.num_rows * self.width, dtype=torch.int32, device=device)
        self._fill_blocks()

    def _begin(self, max_context: int) -> None:
        """Requests on random host pages of their own; of every `page_size` of them, one opens a page in this step."""
        memory, page_size, device = self.memory, self.geometry.page_size, self.device
        self.pages = 1 + torch.randperm(self.batch_size * self.num_pages, device=device).view(self.batch_size, -1)
        self.rows = 1 + torch.arange(self.batch_size, device=device)
        self.seq_lens = self.context_tokens - page_size + 1 + torch.arange(self.batch_size, device=device) % page_size
        self.slots = self.pages[:, -1] * page_size + (self.seq_lens - 1) % page_size
        offsets = torch.arange(page_size, device=device)
        tokens = (self.pages[:, :, None] * page_size + offsets).flatten(1)
        self.req_to_token = torch.zeros((self.batch_size + 1, max_context), dtype=torch.int32, device=device)
        self.req_to_token[1:, : tokens.shape[1]] = tokens
        self.last_page_len = torch.zeros(self.num_rows, dtype=torch.int32, device=device)

        self.batch = memory.tables.batch(self.batch_size)
        memory.begin_step()
        args, _, _ = self.write_tables()["every request"]
        memory.ops.write_tables(*args)

    def _pages_of_chunk(self) -> torch.Tensor:
        return self.pages[0][: CHUNK_TOKENS // self.geometry.page_size]

    def _fill_keys(self) -> None:
        store = self.layer.store
        low, high = torch.randn(store.summary.shape, device=self.device).sort(2).values.unbind(2)
        store.summary.copy_(encode_bounds(low, high))
        self.memory.index.codes[LAYER].random_()
        self.layer.last_q.normal_()
        encoded = torch.cat((self._pages_of_chunk(), self.pages[:, -1]))
        low, high = decode_fp8(store.summary[encoded].cpu())[:, :, :, None].unbind(2)
        k = low.lerp(high, torch.rand((*low.shape[:2], self.geometry.page_size, low.shape[-1])))
        store.host_kv[encoded.cpu(), :, 0] = k.to(store.host_kv.dtype)

    def _write_windows(self) -> torch.Tensor:
        """Write random windows, over which those written before become the other half; int64 ``[num_rows, width]``."""
        memory, layer, sizes = self.memory, self.layer, self.sizes
        memory.begin_step()
        memory.ops.select_pages(self._scores(), self.batch, Half.FRONT, sizes.sink, sizes.recent, "mean", layer.windows)
        (half,) = Half.FRONT.indices(int(self.batch.step))
        window = layer.windows[half, self.rows].long()
        pairs, _ = window_pairs(window, self.batch.page_table, self.batch.num_pages)
        return pairs.flatten(0, 1)

    def _fill_blocks(self) -> None:
        """Give every block to a pair: first to those of the windows, but for the misses, then to any others."""
        tables, device = self.memory.blocks.tables, self.device
        num_pairs, num_blocks = tables.table[0].numel(), tables.owner.shape[1]
        wanted = torch.cat((self.front_pairs, self.back_pairs)).unique()
        self.is_missing = torch.zeros(num_pairs, dtype=torch.bool, device=device)
        self.is_missing[wanted] = torch.rand(len(wanted), device=device) < self.miss_rate
        rank = torch.rand(num_pairs, device=device) + 2 * self.is_missing
        rank[wanted] -= 1
        pairs = rank.argsort()[: min(num_blocks, num_pairs - int(self.is_missing.sum()))]
        blocks = torch.randperm(num_blocks, device=device)[: len(pairs)]
        free = torch.ones(num_blocks, dtype=torch.bool, device=device)
        free[blocks] = False
        free = free.nonzero().flatten().int()
        tables.table.flatten(1)[:, pairs] = blocks.int()
        tables.owner[:, blocks] = pairs.int()
        tables.last_used[:, blocks] = 0
        tables.free_blocks[:, : len(free)] = free
        tables.num_free.fill_(len(free))
        self.pages_by_residency = 1 + (self.layer.store.table[1:] >= 0).sum(-1).argsort()

    def _misses(self, pairs: torch.Tensor) -> MissList:
        """The pairs of a window that have no block."""
        capacity, listed = pairs.numel(), pairs.flatten()
        entries = self.is_missing[listed].nonzero().flatten()
        misses = MissList(
            torch.zeros(capacity, dtype=torch.int64, device=self.device),
            self._count(len(entries)),
            *torch.zeros((2, capacity), dtype=torch.int32, device=self.device),
            self._count(0).new_zeros(4)[1:],
        )
        misses.pairs[: len(entries)] = listed[entries]
        misses.entries[: len(entries)] = entries.int()
        return misses

    def _pairs_of(self, pages: torch.Tensor) -> PairList:
        pairs = pairs_of(pages, self.geometry.num_kv_heads).flatten()
        return PairList(pairs, torch.tensor([len(pairs)], dtype=torch.int32, device=self.device))

    def _flags(self) -> FlagList:
        rows = torch.zeros(self.num_rows, dtype=torch.int32, device=self.device)
        flagged = self.is_flagged.nonzero().flatten().int()
        rows[: len(flagged)] = flagged
        return FlagList(rows, self._count(len(flagged)), self.is_flagged.clone())

    def _count(self, value: int) -> torch.Tensor:
        """A counter, between others, as the engine has them."""
        return torch.tensor([0, value], dtype=torch.int32, device=self.device)[1:]

    def num_missing(self, kind: str) -> int:
        """Pages without a block of the windows that a call of `lookup_blocks` or `fetch_blocks` is for."""
        return int(self.is_missing[self.front_pairs if kind == "front" else self.back_pairs].sum())

    @property
    def num_listed(self) -> int:
        """Pages that the lists of all rows hold, at most."""
        return self._lists().numel()

    def _lists(self) -> torch.Tensor:
        sizes = self.sizes
        width = list_width(CANDIDATES, self.width - sizes.sink - sizes.recent, sizes.sink, sizes.recent)
        return torch.full((self.num_rows, width), -1, dtype=torch.int32, device=self.device)

    def _scores(self) -> torch.Tensor:
        return torch.randn((self.num_rows, self.geometry.group_size, self.memory.max_pages), device=self.device)

    def _qkv(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slices of one projection, as models make them."""
        g = self.geometry
        sizes = [g.num_qo_heads * g.head_dim, *[g.num_kv_heads * g.head_dim] * 2]
        q, k, v = torch.randn((num_tokens, sum(sizes)), device=self.device).to(g.dtype).split(sizes, -1)
        heads = (-1, g.num_kv_heads, g.head_dim)
        return q.view(-1, g.num_kv_heads, g.group_size, g.head_dim), k.view(heads), v.view(heads)
