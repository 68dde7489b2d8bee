"""The memory side of the engine: every tensor of one rank, allocated once at start-up."""

from __future__ import annotations

import torch

from freekv_kernels import REFERENCE, Batch, FlagList, Half, Ops, PageStore, triton_ops
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.budgets import Budgets
from sglang_freekv.memory.counters import Counters
from sglang_freekv.memory.device_blocks import DeviceBlocks
from sglang_freekv.memory.footprint import DeviceFootprint
from sglang_freekv.memory.geometry import Geometry, num_pages_of
from sglang_freekv.memory.host_store import HostStore
from sglang_freekv.memory.layers import Layer, arena_tokens, kinds_of, sliding_kinds
from sglang_freekv.memory.page_indexes import index_of
from sglang_freekv.memory.selection_reads import SelectionReads
from sglang_freekv.memory.sliding import SlidingWindows, sliding_blocks
from sglang_freekv.memory.step_tables import StepTables
from sglang_freekv.memory.windows import Windows, WindowSizes


class KVMemory:
    """All tensors of KV retrieval, released with the scheduler.

    Parameters
    ----------
    geometry : Geometry
        The owner of what config and geometry both say: page size and bits of codes.
    config : FreeKVConfig
    num_host_pages : int
        Pages of the host store, the padding page 0 included.
    num_blocks : int
        Device blocks of each layer whose windows are chosen; one with a sliding window has what its window takes.
    max_requests : int
        Rows of SGLang's request table; row 0 is padding and comes on top.
    max_context : int
        Most tokens of one request.
    device : str
    ops : Ops, optional
        By default Triton kernels on a GPU, and their references on a CPU.

    Attributes
    ----------
    runs_references : bool
        Whether the ops are the references, which wait for what they compute: a step may spare what it does not need.
    sizes : WindowSizes
    kinds : tuple of LayerKind
        Of each layer.
    sliding : dict of LayerKind to SlidingWindows
        Of every kind with a sliding window.
    index : PageIndex
        What pages are chosen by.
    layers : list of Layer
    """

    def __init__(
        self,
        geometry: Geometry,
        config: FreeKVConfig,
        *,
        num_host_pages: int,
        num_blocks: int,
        max_requests: int,
        max_context: int,
        device: str = "cpu",
        ops: Ops | None = None,
    ) -> None:
        g = geometry
        self.geometry, self.max_requests, self.device = g, max_requests, device
        self.ops = ops or (REFERENCE if device == "cpu" else triton_ops())
        self.runs_references = self.ops is REFERENCE
        self.max_pages = num_pages_of(max_context, g.page_size)
        self._places = g.places
        self.host = HostStore(g, num_host_pages, device)
        self.index = index_of(config)(g, num_host_pages, device)
        shape = (2, arena_tokens(config, g), 2, g.num_kv_heads, g.head_dim)  # half, token, K or V
        self.arena = torch.empty(shape, dtype=g.dtype, device=device)
        self.start(config, num_blocks)

    def start(self, config: FreeKVConfig, num_blocks: int) -> None:
        """Start, or start over: no requests, all blocks free, counters at zero; host store and index stay as they are.

        No request may be running, and captured graphs are void.

        Parameters
        ----------
        config : FreeKVConfig
            Whose selector must read the index that there is.
        """
        g = self.geometry
        self.layers, self.blocks, self.tables, self.windows = [], None, None, None  # the old go before the new come
        if self.device != "cpu":
            torch.cuda.empty_cache()
        self.config = config
        self.sizes = WindowSizes.of(config, g.page_size)
        self.kinds = kinds_of(config, g)
        sliding = (g, self.max_requests, self.max_pages, self.device)
        self.sliding = {kind: SlidingWindows.of(kind, *sliding) for kind in sliding_kinds(g)}
        self._footprint = DeviceFootprint(g, self.kinds, index_of(config).page_bytes(g))
        num_selecting = sum(kind.selects for kind in self.kinds)
        self._selection_reads = SelectionReads(g, config, num_selecting, self.max_pages)
        scored_page_bytes = self._selection_reads.page_bytes_of_row if config.score_interval > 1 else 0
        self.counters = Counters(g.record_bytes, self.device, scored_page_bytes)
        self.windows = Windows(g, self.max_requests, self.sizes.width, self.device)
        self.budgets = Budgets(g, self.max_requests, self.sizes, config.mass, self.device)
        self._allocate_blocks(num_blocks)

    def _allocate_blocks(self, num_blocks: int) -> None:
        """Blocks, and all that knows their addresses."""
        self.blocks = DeviceBlocks(
            self.geometry,
            self.ops,
            num_host_pages=self.host.num_host_pages,
            num_blocks=num_blocks,
            kinds=self.kinds,
            num_sliding={
                kind: sliding_blocks(
                    kind,
                    self.geometry,
                    max_pages=self.max_pages,
                    max_requests=self.max_requests,
                    num_host_pages=self.host.num_host_pages,
                )
                for kind in self.sliding
            },
            counters=self.counters.values,
            device=self.device,
        )
        self.tables = StepTables(
            self.geometry,
            width=max([self.sizes.width, *(windows.width for windows in self.sliding.values())]),
            max_requests=self.max_requests,
            max_pages=self.max_pages,
            step=self.blocks.step,
            num_listed=self.sizes.num_listed(self.config.candidates, self.max_pages),
            num_scored=self.sizes.num_scored(self.config.candidates, self.max_pages),
            # A dump tells those of every layer, and an audit asks for them where there are candidates.
            keeps_flags=self.config.debug_dump is not None or self.config.candidates > 0,
            by_mass=self.config.mass is not None,
            device=self.device,
        )
        self.layers = [self._layer(number) for number in range(self.geometry.num_layers)]

    def _layer(self, number: int) -> Layer:
        table, kind, place = self.blocks.tables.table[number], self.kinds[number], self._places.get(number)
        return Layer(
            number=number,
            kind=kind,
            store=PageStore(
                host_kv=self.host.kv[:, number],
                summary=self.index.summary(number),
                block_kv=self.blocks.kv[number],
                table=table,
                codec=self.geometry.codec,
            ),
            blocks=self.blocks.of_layer(number),
            windows=self.sliding[kind].pages if place is None else self.windows.pages[:, place],
            row_budgets=None if self.config.mass is None else self.budgets.of_layers[number],
            last_q=None if place is None else self.windows.last_q[place],
            pace=None if place is None else self.windows.pace[place],
            front=self.tables.misses(number, Half.FRONT),
            back=self.tables.misses(number, Half.BACK),
        )

    def admit(self, row: int, budget_tokens: int | None = None, mass: float | None = None) -> None:
        """A request takes `row` of the request table; budget (tokens) and mass are the configured ones unless given."""
        budget_pages = self.sizes.budget if budget_tokens is None else budget_tokens // self.geometry.page_size
        self.budgets.admit(row, budget_pages, mass)

    def append(
        self,
        layer: Layer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: Batch,
        flags: FlagList | None,
        queries: torch.Tensor | None,
        fills_pages: bool,
        due: FlagList | None = None,
    ) -> None:
        """Write one decoded token per request: see the op `append_tokens`.

        Parameters
        ----------
        fills_pages : bool
            Whether a token may be the last one of its page, which then is full.
        due : FlagList, optional
            Written: the rows that are scored. None: all that are over their next budget.
        """
        codes, groups = self.index.encoded_by_append(layer.number, batch.groups) if fills_pages else (None, None)
        kept = (layer.last_q, flags, self.counters.values, queries)
        encoded, paced = (codes, groups), (None, None) if due is None else (layer.pace, due)
        self.ops.append_tokens(q, k, v, batch, self.config.min_cosine, layer.store, *kept, *encoded, *paced)
        if fills_pages and codes is None:
            self.seal(layer, batch.slots, batch.groups)

    def seal(self, layer: Layer, slots: torch.Tensor, groups: torch.Tensor) -> None:
        """The pages that end with one of these token slots are full now: what hangs on full pages hears of it here.

        Parameters
        ----------
        slots : int64, ``[n]``, device
            Just written, at most one of a page; most do not end their page.
        groups : int64, ``[n, GROUP_PAGES]``, device
            Host pages of the group of pages that ends with the page of each slot, -1 where none does.
        """
        if layer.kind.sliding_window is None:
            self.index.seal(self.ops, layer.number, layer.store, slots, groups)

    def begin_step(self) -> None:
        """A decode step starts: the windows written for it come to the front."""
        self.counters.steps += 1
        self.blocks.advance(self.counters.steps)

    def count_tokens(self, lens: list[int], num_pages: list[int], budgets: list[list[int]]) -> None:
        """A decode step has these requests: their tokens with the new one, their pages, and pages that a head reads."""
        counters = self.counters
        counters.decoded_tokens += len(lens)
        counters.host_token_steps += sum(lens)
        counters.device_token_steps += self._footprint.tokens(num_pages, budgets)
        if self.config.score_interval == 1:  # otherwise the device knows which rows are scored
            counters.selection_bytes += self._selection_reads.bytes(num_pages, budgets)

    def device_bytes(self) -> dict[str, int]:
        """Device memory by purpose, measured from the tensors."""
        return {
            "device_blocks_bytes": self.blocks.nbytes,
            "block_table_bytes": sum(tensor.nbytes for tensor in self.blocks.tables),
            "page_summaries_bytes": self.index.nbytes,
            "windows_bytes": self.windows.nbytes + sum(windows.nbytes for windows in self.sliding.values()),
            "prefill_arena_bytes": self.arena.nbytes,
            "workspace_bytes": self.tables.nbytes,
        }

    def unpin(self) -> None:
        """Give the host store's memory back to the system."""
        self.host.unpin()

    def check_integrity(self) -> None:
        """Raise RuntimeError where an invariant of the pools is broken."""
        self.host.check_integrity()
        self.blocks.check_integrity()
