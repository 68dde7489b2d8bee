"""What the kernels are called with: the engine's own tensors, in the middle of a decode step of a given size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from freekv_kernels import GROUP_PAGES, Claim, FlagList, Half, MissList, PairList, list_width, pairs_of, window_pairs
from freekv_kernels.fp8 import decode_fp8, encode_bounds
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry, num_pages_of
from sglang_freekv.memory.kv_memory import KVMemory

_CHUNK_TOKENS = 8192  # of prefill
_CANDIDATES = 5  # pages scored for each one selected, with two levels
_LAYER = 1  # not the first: its counters are at addresses that are multiples of 4 bytes only, as in most layers


class Call(NamedTuple):
    """One call of an op."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012  never changed
    changed: tuple[torch.Tensor, ...] = ()  # to be restored before the call can be repeated with the same effect


class KernelInputs:
    """A decode step in which every request is over its budget, and a prefill chunk of the first request.

    There is a method for each op, of the op's name, which returns its calls by what they are for. Values that no kernel
    looks at, as most of those in the host store, are undefined.

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
        self.layer, self.sizes = self.memory.layers[_LAYER], self.memory.sizes
        self.width = self.sizes.max_budget
        self._begin(max_context)
        self._fill_keys()
        self.is_flagged = torch.rand(self.num_rows, device=device) < flag_rate
        self.back_pairs, self.front_pairs = self._write_windows(), self._write_windows()
        self.kv_indptr = torch.arange(self.num_rows + 1, dtype=torch.int32, device=device) * self.width
        self.kv_indices = torch.zeros(self.num_rows * self.width, dtype=torch.int32, device=device)
        self._fill_blocks()

    def write_tables(self) -> dict[str, Call]:
        memory = self.memory
        tables = (self.batch, self.last_page_len, memory.windows.pages, memory.host.filled, memory.tables.opened)
        inputs = (self.rows, self.seq_lens, self.slots, self.req_to_token, memory.budgets.pages)
        return {"every request": Call((*inputs, self.geometry.page_size, *tables))}

    def forget_blocks(self) -> dict[str, Call]:
        tables = self.memory.blocks.tables
        opened = self._pairs_of(self.pages_by_residency[-self.batch_size :])
        return {"pages opened by a step": Call((opened, tables), changed=tables)}

    def list_pages(self) -> dict[str, Call]:
        entries = self.batch.num_pages.repeat_interleave(self.geometry.num_kv_heads).cumsum(0)
        kv_indptr = torch.cat((entries.new_zeros(1), entries)).int()
        kv_indices = torch.empty(self.num_rows * self.num_pages, dtype=torch.int32, device=self.device)
        return {"every page": Call((self.batch, self.geometry.num_kv_heads, kv_indptr, kv_indices))}

    def append_tokens(self) -> dict[str, Call]:
        layer, flags, counters = self.layer, self._flags(), self.memory.counters.values
        q, k, v = self._qkv(self.batch_size)
        flags.count.zero_()
        kept = (layer.last_q, flags, counters, torch.empty(q.shape, dtype=q.dtype, device=self.device))
        args = (q, k, v, self.batch, self.config.min_cosine, layer.store, *kept)
        return {"one token each": Call(args, changed=(layer.last_q, flags.count))}

    def list_candidates(self) -> dict[str, Call]:
        pages, sizes = self._lists(), self.sizes
        args = (self.layer.last_q, self.layer.store.summary, self.batch, Half.BACK, self.geometry.head_dim**-0.5)
        return {"back": Call((*args, _CANDIDATES, sizes.sink, sizes.recent, self.layer.windows, pages, self._scores()))}

    def score_pages(self) -> dict[str, Call]:
        args = (self.layer.last_q, self.layer.store.summary, self.batch)
        flagged, codes = {"flags": self._flags(), "out": self._scores()}, {"codes": self.memory.index.codes[_LAYER]}
        listed = self._lists()
        for call in self.list_candidates().values():
            self.memory.ops.list_candidates(*call.args[:9], listed)
        mass = codes | {"scale": self.geometry.head_dim**-0.5}
        return {
            "front, flagged rows": Call((*args, Half.FRONT), flagged),
            "back": Call((*args, Half.BACK), {"out": self._scores()}),
            "first": Call((*args, Half.BOTH)),
            "front, flagged rows, by codes": Call((*args, Half.FRONT), flagged | codes),
            "back, by codes": Call((*args, Half.BACK), {"out": self._scores()} | codes),
            "first, by codes": Call((*args, Half.BOTH), codes),
            "back, by mass": Call((*args, Half.BACK), {"out": self._scores()} | mass),
            "back, by mass, of a list": Call((*args, Half.BACK), {"out": self._scores()} | mass | {"pages": listed}),
        }

    def share_pages(self) -> dict[str, Call]:
        layer, scores = self.layer, self._scores()
        args = (scores, layer.last_q, layer.store, self.batch, Half.BACK, self.geometry.head_dim**-0.5)
        return {"back": Call(args, changed=(scores,))}

    def correct_windows(self) -> dict[str, Call]:
        flags, windows = self._flags(), self.layer.windows
        flags.count.zero_()
        scores, scale = self._scores(), self.geometry.head_dim**-0.5
        masses = (scores, self.layer.last_q, self.layer.store, self.batch, self.batch.budget_pages, scale)
        rule = (0.01, self.sizes.sink, self.sizes.recent, windows, flags, self.memory.counters.values, 0.5)
        return {"every row": Call((*masses, *rule), changed=(scores, windows, flags.count))}

    def apportion_pages(self) -> dict[str, Call]:
        memory, budgets = self.memory, self.batch.budget_pages
        masses = torch.full((self.batch_size + 1,), 0.9, device=self.device)
        shares = self._scores()[:, :1].log_softmax(-1)
        rule = (masses, self.sizes.sink, self.sizes.recent, 4)
        written = (torch.zeros_like(budgets), memory.budgets.pages.clone())
        return {"back": Call((shares, self.batch, Half.BACK, *rule, *written))}

    def select_pages(self) -> dict[str, Call]:
        def call(half: Half, pooling: str, flags: FlagList | None = None, hysteresis: float = 0.0) -> Call:
            scores = self._scores()
            fixed = (self.sizes.sink, self.sizes.recent, pooling, self.layer.windows)
            return Call((scores, self.batch, half, *fixed, flags, 1.0, hysteresis), changed=(scores,))

        return {
            "front, flagged rows": call(Half.FRONT, "softmax", self._flags()),
            "back": call(Half.BACK, "softmax"),
            "back, mean": call(Half.BACK, "mean"),
            "back, hysteresis": call(Half.BACK, "softmax", hysteresis=0.5),
            "first": call(Half.BOTH, "softmax"),
        }

    def lookup_blocks(self) -> dict[str, Call]:
        def call(half: Half, *front: Any) -> Call:
            misses = self._misses(self.back_pairs)
            misses.count.zero_()
            args = (self.layer.windows, self.batch, half, self.layer.blocks, misses, self.memory.counters.values)
            return Call((*args, *front), changed=(misses.count,))

        return {
            "front": call(Half.FRONT, self._flags(), self.kv_indptr, self.kv_indices),
            "back": call(Half.BACK),
            "first": call(Half.BOTH),
        }

    def claim_blocks(self) -> dict[str, Call]:
        tables, one, step = self.memory.blocks.tables, self.layer.blocks, self.batch.step
        counters = self.memory.counters.values
        front, back = self._misses(self.front_pairs), self._misses(self.back_pairs)
        in_step, in_chunk = (self._pairs_of(self.pages_by_residency[:n]) for n in (self.batch_size, self.num_pages))
        return {
            "pages opened by a step, all layers": Call(
                (in_step, tables, step, Claim.BETWEEN_STEPS, counters), {}, tables
            ),
            "pages opened by a chunk": Call((in_chunk, one, step, Claim.AS_OLD, counters), {}, one),
            "front": Call((front, one, step, Claim.IN_STEP, counters), {}, (*one, front.blocks)),
            "back": Call((back, one, step, Claim.IN_STEP, counters), {}, (*one, back.blocks)),
            "first": Call((back, one, step, Claim.BETWEEN_STEPS, counters), {}, (*one, back.blocks)),
        }

    def recall_blocks(self) -> dict[str, Call]:
        store, counters = self.layer.store, self.memory.counters.values

        def call(pairs: torch.Tensor, *kv_indices: torch.Tensor) -> Call:
            misses = self._misses(pairs)
            count = int(misses.count)
            misses.blocks[:count] = torch.randperm(len(store.block_kv), device=self.device)[:count].int()
            return Call((store, misses, counters, *kv_indices))

        return {"front": call(self.front_pairs, self.kv_indices), "back": call(self.back_pairs)}

    def fetch_blocks(self) -> dict[str, Call]:
        layer = self.layer

        def call(half: Half, *front: Any) -> Call:
            misses = self._misses(self.back_pairs)
            misses.count.zero_()
            args = (layer.windows, self.batch, half, layer.store, layer.blocks, misses, self.memory.counters.values)
            return Call((*args, *front), changed=(*layer.blocks, misses.count, misses.progress))

        return {
            "front": call(Half.FRONT, self._flags(), self.kv_indptr, self.kv_indices),
            "back": call(Half.BACK),
            "first": call(Half.BOTH),
        }

    def store_pages(self) -> dict[str, Call]:
        page_size = self.geometry.page_size
        pages = self._pages_of_chunk()
        slots = (pages[:, None] * page_size + torch.arange(page_size, device=self.device)).flatten()
        page_starts = torch.arange(len(pages) + 1, device=self.device) * page_size
        _, k, v = self._qkv(len(slots))
        return {"a chunk": Call((k, v, slots, page_starts, self.layer.store))}

    def encode_pages(self) -> dict[str, Call]:
        pages, page_size = self._pages_of_chunk(), self.geometry.page_size
        last_slots = pages * page_size + page_size - 1
        groups = torch.full((len(pages), GROUP_PAGES), -1, device=self.device)
        whole = pages[: len(pages) // GROUP_PAGES * GROUP_PAGES]
        groups[GROUP_PAGES - 1 :: GROUP_PAGES] = whole.view(-1, GROUP_PAGES)
        written = (self.layer.store, self.memory.index.codes[_LAYER])
        return {
            "one token each": Call((self.batch.slots, *written)),
            "a chunk": Call((last_slots, *written)),
            "one token each, with groups": Call((self.batch.slots, *written, self.batch.groups)),
            "a chunk, with groups": Call((last_slots, *written, groups)),
        }

    def fill_arena(self) -> dict[str, Call]:
        arena = self.memory.arena[0]
        pages = self.pages[0][: len(arena) // self.geometry.page_size]
        return {"a prefix": Call((arena, self.layer.store, pages))}

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
        return self.pages[0][: _CHUNK_TOKENS // self.geometry.page_size]

    def _fill_keys(self) -> None:
        store = self.layer.store
        low, high = torch.randn(store.summary.shape, device=self.device).sort(2).values.unbind(2)
        store.summary.copy_(encode_bounds(low, high))
        self.memory.index.codes[_LAYER].random_()
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
        width = list_width(_CANDIDATES, self.width - sizes.sink - sizes.recent, sizes.sink, sizes.recent)
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
