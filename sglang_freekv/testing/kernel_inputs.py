"""What the kernels are called with, op by op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from freekv_kernels import GROUP_PAGES, Claim, FlagList, Half
from freekv_kernels.score_pages import list_rows
from sglang_freekv.testing.decode_state import CANDIDATES, LAYER, DecodeState


class Call(NamedTuple):
    """One call of an op."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012  never changed
    changed: tuple[torch.Tensor, ...] = ()  # to be restored before the call can be repeated with the same effect


class KernelInputs(DecodeState):
    """For each op a method of its name, which returns its calls by what they are for."""

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
        codes, due = self.memory.index.codes[LAYER], self.memory.tables.due(self.batch_size)[LAYER]
        changed = (layer.last_q, flags.count, due.count, layer.pace)
        return {
            "one token each, by pace": Call((*args, codes, None, layer.pace, due), changed=changed),
            "one token each": Call((*args, codes), changed=changed),
            "one token each, with groups": Call((*args, codes, self.batch.groups), changed=changed),
            "one token each, nothing encoded": Call(args, changed=changed),
        }

    def list_candidates(self) -> dict[str, Call]:
        pages, sizes = self._lists(), self.sizes
        args = (self.layer.last_q, self.layer.store.summary, self.batch, Half.BACK, self.geometry.head_dim**-0.5)
        return {"back": Call((*args, CANDIDATES, sizes.sink, sizes.recent, self.layer.windows, pages, self._scores()))}

    def score_pages(self) -> dict[str, Call]:
        args = (self.layer.last_q, self.layer.store.summary, self.batch)
        flagged, codes = {"flags": self._flags(), "out": self._scores()}, {"codes": self.memory.index.codes[LAYER]}
        listed = self._lists()
        for call in self.list_candidates().values():
            self.memory.ops.list_candidates(*call.args[:9], listed)
        mass = codes | {"scale": self.geometry.head_dim**-0.5}
        due = {"flags": self._flags(), "out": self._scores()}
        return {
            "front, flagged rows": Call((*args, Half.FRONT), flagged),
            "back": Call((*args, Half.BACK), {"out": self._scores()}),
            "first": Call((*args, Half.BOTH)),
            "front, flagged rows, by codes": Call((*args, Half.FRONT), flagged | codes),
            "back, by codes": Call((*args, Half.BACK), {"out": self._scores()} | codes),
            "first, by codes": Call((*args, Half.BOTH), codes),
            "back, by mass": Call((*args, Half.BACK), {"out": self._scores()} | mass),
            "back, by mass, due rows": Call((*args, Half.BACK), due | mass),
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
        pace = self.layer.pace
        rows, count, is_due = (torch.empty_like(tensor) for tensor in flags)
        due = FlagList(rows, count, is_due)
        list_rows(torch.ones_like(is_due), due)
        paced = (None, due, pace, 8)
        changed = (scores, windows, flags.count, pace)
        return {
            "every row": Call((*masses, *rule), changed=changed),
            "due rows": Call((*masses, *rule, *paced), changed=changed),
        }

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
        written = (self.layer.store, self.memory.index.codes[LAYER])
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
