"""A scheduler small enough to see through, that drives the memory side without SGLang.

`SimulatedEngine` hands out rows and host pages as SGLang does, and has every prefill chunk and decode step held
against the reference by `reference_checks`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from freekv_kernels import Ops, PairList
from sglang_freekv.algorithm.engine import build_engine
from sglang_freekv.algorithm.inputs import DecodeInput, ExtendInput
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.windows import WindowSizes
from sglang_freekv.testing.reference_decoder import ReferenceRequest
from sglang_freekv.testing.reference_scores import Rule
from tests.support.random_traces import Trace
from tests.support.reference_checks import DecodedToken, ReferenceChecks, Request

PAGE = Geometry.page_size  # tokens, where a test does not say otherwise
UNWRITTEN_BOUND = 0x7F  # FP8's NaN
UNWRITTEN_CODE = 255  # every element is at its maximum


class SimulatedEngine:
    """Rows, host pages and steps; every step is checked against the reference.

    Parameters
    ----------
    geometry : Geometry
        Its `key_bits` are those of the config, as in a server.
    num_blocks : int, optional
        Device blocks per layer; by default as few as can work.
    ops : Ops, optional
        By default those of the device.
    sinks : float32, ``[num_layers, num_qo_heads]``, optional
        Of the model's softmax.
    device : str
        Of the engine; the reference is on the CPU.

    Attributes
    ----------
    corrected, kept : int
        Over-budget rows whose window was chosen with this step's query, or with the previous one.
    """

    def __init__(
        self,
        geometry: Geometry,
        config: FreeKVConfig,
        *,
        max_requests: int = 4,
        num_pages: int = 120,
        num_blocks: int | None = None,
        ops: Ops | None = None,
        sinks: torch.Tensor | None = None,
        device: str = "cpu",
    ) -> None:
        g = replace(geometry, key_bits=config.key_bits)
        if num_blocks is None:
            num_blocks = 2 * WindowSizes.of(config, g.page_size).max_budget * g.num_kv_heads * max_requests
        self.geometry, self.config, self.scale = g, config, 1 / math.sqrt(g.head_dim)
        self.page_size, self.sinks = g.page_size, sinks
        self.device = device
        self.memory = KVMemory(
            g,
            config,
            num_host_pages=num_pages,
            num_blocks=num_blocks,
            max_requests=max_requests,
            max_context=num_pages * g.page_size,
            device=device,
            ops=ops,
        )
        for tensor in (self.memory.host.kv, self.memory.arena):
            tensor.fill_(math.nan)  # what is read before it is written shows
        self.memory.index.summaries.fill_(UNWRITTEN_BOUND)
        if g.key_bits:
            self.memory.index.codes.fill_(UNWRITTEN_CODE)
        self._build()
        self.req_to_token = torch.zeros((max_requests + 1, num_pages * g.page_size), dtype=torch.int32, device=device)
        self.free_rows = list(range(max_requests, 0, -1))
        self.free_pages = list(range(num_pages - 1, 0, -1))
        self.users = [0] * num_pages  # requests that hold each host page
        self.requests: list[Request] = []
        self.corrected = self.kept = 0

    def _build(self) -> None:
        for kv in self.memory.blocks.kv:
            kv.fill_(math.nan)
        self.decoder, self.prefiller = build_engine(self.memory)
        self.rule = Rule.of(self.memory)
        self.checks = ReferenceChecks(self.memory, self.rule, self.sinks)

    def start_over(self, config: FreeKVConfig, num_blocks: int) -> None:
        """Other settings, once no request is left; pages that are held stay as they are."""
        self.config = config
        self.memory.start(config, num_blocks)
        self._build()

    # Requests come and go

    def start(
        self,
        trace: Trace,
        prompt_tokens: int,
        *,
        budget_tokens: int | None = None,
        mass: float | None = None,
        prefix: Request | None = None,
        prefix_tokens: int = 0,
    ) -> Request:
        """Admit a request; its first `prefix_tokens` are a prefix hit on the pages of `prefix`."""
        row = self.free_rows.pop()
        self.memory.admit(row, budget_tokens, mass)
        budget_pages = (budget_tokens or self.config.budget_tokens) // self.page_size
        request = Request(trace, prompt_tokens, row, ReferenceRequest(self.rule, budget_pages, mass))
        if prefix is not None:
            self._map_pages(request, prefix.pages[: prefix_tokens // self.page_size])
            known = zip(trace.k[:, :prefix_tokens], trace.v[:, :prefix_tokens], strict=True)
            for layer, (k, v) in enumerate(known):
                request.reference.remember(layer, k, v)
            request.length = prefix_tokens
        self.requests.append(request)
        return request

    def leave(self, request: Request) -> None:
        """Finish, abort or retract: the row and the pages are free for others at once."""
        self.requests.remove(request)
        self.free_rows.append(request.row)
        self.release(request.pages)

    def replace_pages(self, request: Request, pages: list[int]) -> None:
        """Give a running request other host pages with the same content for its first pages."""
        replaced = request.pages[: len(pages)]
        self._map_pages(request, pages)
        self.release(replaced)

    def hold(self, pages: list[int]) -> None:
        """Keep pages for one more user, as the radix tree does."""
        for page in pages:
            self.users[page] += 1

    def release(self, pages: list[int]) -> None:
        """Undo one `hold`; pages without a user are free."""
        for page in pages:
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free_pages.append(page)

    def _map_pages(self, request: Request, pages: list[int]) -> None:
        request.pages[: len(pages)] = pages
        self.hold(pages)
        for logical, page in enumerate(pages):
            self._write_slots(request.row, logical, page)

    def _write_slots(self, row: int, logical: int, page: int) -> None:
        offsets = torch.arange(self.page_size, device=self.device)
        self.req_to_token[row, logical * self.page_size + offsets] = (page * self.page_size + offsets).int()

    def _grow(self, request: Request, num_tokens: int) -> None:
        """Allocate pages for the next tokens of a request."""
        request.length += num_tokens
        while len(request.pages) * self.page_size < request.length:
            page = self.free_pages.pop()
            self.users[page] = 1
            self._write_slots(request.row, len(request.pages), page)
            request.pages.append(page)

    # Steps

    def prefill(self, chunks: list[tuple[Request, int]]) -> list[torch.Tensor]:
        """Run and check one extend batch; returns the outputs `[num_layers, n, Hq, D]` of each request."""
        spans = [(request, request.length, request.length + num_tokens) for request, num_tokens in chunks]
        for request, num_tokens in chunks:
            self._grow(request, num_tokens)
        rows = [request.row for request, _ in chunks]
        slots = torch.cat([self.req_to_token[r.row, first:last] for r, first, last in spans]).long()
        starts, lens = [first for _, first, _ in spans], [num_tokens for _, num_tokens in chunks]
        is_final = [request.is_decoding for request, _ in chunks]
        self.prefiller.plan(ExtendInput(self._tensor(rows), slots, self.req_to_token, rows, starts, lens, is_final))
        outputs = []
        for layer in range(self.geometry.num_layers):
            parts = [request.trace.tokens(layer, first, last) for request, first, last in spans]
            q, k, v = (torch.cat(x).to(self.device) for x in zip(*parts, strict=True))
            outputs.append(self.prefiller.run(layer, q, k, v, self.scale, self._sinks_of(layer)).cpu())
            expected = [
                request.reference.prefill(layer, *part, self.scale, self._sinks_of(layer))
                for (request, _), part in zip(chunks, parts, strict=True)
            ]
            self.checks.output(outputs[-1], torch.cat(expected))
        self.prefiller.finish()
        self.checks.invariants(self.requests)
        return list(torch.stack(outputs).split(lens, dim=1))

    def prefill_whole(self, *requests: Request) -> None:
        """Prefill what is left of some prompts in one batch."""
        self.prefill([(request, request.prompt_tokens - request.length) for request in requests])

    def decode(self) -> list[DecodedToken]:
        """Run and check one decode step of every request that has its prompt."""
        requests = [request for request in self.requests if request.is_decoding]
        for request in requests:
            self._grow(request, 1)
        before = self.memory.counters.as_dict()
        self.plan_decode(requests)
        tokens = [DecodedToken(request, [], []) for request in requests]
        for layer in range(self.geometry.num_layers):
            parts = [r.trace.tokens(layer, r.length - 1, r.length) for r in requests]
            q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
            out = self.run_decode(layer, *(x.to(self.device) for x in (q, k, v))).cpu()
            for b, token in enumerate(tokens):
                token.outputs.append(out[b])
                token.expected.append(token.request.reference.decode(layer, q[b], k[b], v[b]))
        self.decoder.finish()
        front, back = (self._windows(ahead) for ahead in (0, 1))
        for token in tokens:
            self.checks.windows(token, front, back)
        corrected, kept = self.checks.flags(before, [expected for token in tokens for expected in token.expected])
        self.corrected += corrected
        self.kept += kept
        self.checks.invariants(self.requests)
        return tokens

    def plan_decode(self, requests: list[Request]) -> None:
        rows, lens = [request.row for request in requests], [request.length for request in requests]
        slots = self.req_to_token[self._tensor(rows), self._tensor(lens) - 1].long()
        self.decoder.plan(DecodeInput(self._tensor(rows), self._tensor(lens), slots, self.req_to_token, rows, lens))

    def run_decode(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.decoder.run(layer, q, k, v, self.scale, self._sinks_of(layer))

    def _sinks_of(self, layer: int) -> torch.Tensor | None:
        return None if self.sinks is None else self.sinks[layer]

    def forget_blocks(self, pages: list[int]) -> None:
        """Evict every block of some pages."""
        num_kv_heads = self.geometry.num_kv_heads
        pairs = [page * num_kv_heads + head for page in pages for head in range(num_kv_heads)]
        self.memory.blocks.forget(PairList(self._tensor(pairs), self._tensor([len(pairs)]).int()))

    def front(self, layer: int) -> torch.Tensor:
        """The windows `[max_requests + 1, H, W]` that the last step read, of a layer whose queries see all."""
        return self._windows(0)[self.geometry.full_layers.index(layer)]

    def back(self, layer: int) -> torch.Tensor:
        """Those that the next step will read."""
        return self._windows(1)[self.geometry.full_layers.index(layer)]

    def _windows(self, ahead: int) -> torch.Tensor:
        return self.memory.windows.pages[(int(self.memory.blocks.step) + ahead) % 2]

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
