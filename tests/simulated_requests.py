"""A scheduler small enough to see through, that drives the memory side without SGLang.

`SimulatedEngine` hands out rows and host pages as SGLang does, and holds every prefill chunk and decode step
against `reference_decoder`: windows, outputs, device blocks, host pages, summaries and counters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from freekv_kernels import Count, KeyList, Ops
from op_tables import decode_keys
from random_traces import Trace
from reference_decoder import Expected, ReferenceRequest, Rule, explain_difference
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.engine import build_engine
from sglang_freekv.geometry import Geometry
from sglang_freekv.kv_memory import KVMemory

PAGE = Geometry.page_size  # tokens, where a test does not say otherwise
OUTPUT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # bf16: 8 bits of a result of magnitude <= 4
SCORE_TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 1e-3}  # scores are of magnitude 10 to 100
CODES_TOLERANCE = 2e-2  # instead of 1e-3: a GPU rounds what codes stand for to 11 bits
ROUNDING = 1e-6  # of a code, relative to a step
UNWRITTEN_CODE = 255  # every element is at its maximum


@dataclass(eq=False)  # one request is never another
class Request:
    """A request that runs: its future, its place in the engine and what is expected of it."""

    trace: Trace
    prompt_tokens: int
    row: int
    reference: ReferenceRequest
    length: int = 0  # tokens written
    pages: list[int] = field(default_factory=list)  # host page of each logical page

    @property
    def is_decoding(self) -> bool:
        return self.length >= self.prompt_tokens


@dataclass(frozen=True)
class DecodedToken:
    """One decode step of one request: per layer, what was expected, and the output `[Hq, D]` of attention."""

    request: Request
    expected: list[Expected]
    outputs: list[torch.Tensor]


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
        device: str = "cpu",
    ) -> None:
        g = replace(geometry, key_bits=config.key_bits)
        if num_blocks is None:
            num_blocks = 2 * config.max_budget_pages * g.num_kv_heads * max_requests
        self.geometry, self.config, self.scale = g, config, 1 / math.sqrt(g.head_dim)
        self.page_size = g.page_size
        self.device = device
        self.memory = KVMemory(
            g,
            config,
            num_pages=num_pages,
            num_blocks=num_blocks,
            max_requests=max_requests,
            max_context=num_pages * g.page_size,
            device=device,
            ops=ops,
        )
        host, blocks = self.memory.host, self.memory.blocks
        for tensor in (host.kv, host.summary, self.memory.arena, *blocks.kv):
            tensor.fill_(math.nan)  # what is read before it is written shows
        host.codes.fill_(UNWRITTEN_CODE)
        has_rounded_scores = g.key_bits > 0 and g.dtype != torch.float32
        self.score_tolerance = CODES_TOLERANCE if has_rounded_scores else SCORE_TOLERANCE[g.dtype]
        self.retrieval, self.prefiller = build_engine(self.memory)
        self.rule = Rule(
            num_layers=g.num_layers,
            num_qo_heads=g.num_qo_heads,
            num_kv_heads=g.num_kv_heads,
            sink_pages=config.sink_pages,
            recent_pages=config.recent_pages,
            tau=config.tau,
            pooling=config.group_pooling,
            scale=self.scale,
            page_size=g.page_size,
            key_bits=g.key_bits,
            dense_layers=config.dense_layers,
        )
        self.req_to_token = torch.zeros((max_requests + 1, num_pages * g.page_size), dtype=torch.int32, device=device)
        self.free_rows = list(range(max_requests, 0, -1))
        self.free_pages = list(range(num_pages - 1, 0, -1))
        self.users = [0] * num_pages  # requests that hold each host page
        self.requests: list[Request] = []
        self.corrected = self.kept = 0

    # Requests come and go

    def start(
        self,
        trace: Trace,
        prompt_tokens: int,
        *,
        budget_tokens: int | None = None,
        prefix: Request | None = None,
        prefix_tokens: int = 0,
    ) -> Request:
        """Admit a request; its first `prefix_tokens` are a prefix hit on the pages of `prefix`."""
        row = self.free_rows.pop()
        self.memory.admit(row, budget_tokens)
        budget_pages = (budget_tokens or self.config.budget_tokens) // self.page_size
        request = Request(trace, prompt_tokens, row, ReferenceRequest(self.rule, budget_pages))
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
        self.prefiller.plan(self._tensor(rows), slots, self.req_to_token, rows, starts, lens, is_final)
        outputs = []
        for layer in range(self.geometry.num_layers):
            parts = [request.trace.tokens(layer, first, last) for request, first, last in spans]
            q, k, v = (torch.cat(x).to(self.device) for x in zip(*parts, strict=True))
            outputs.append(self.prefiller.run(layer, q, k, v, self.scale).cpu())
            expected = [
                request.reference.prefill(layer, *part, self.scale)
                for (request, _), part in zip(chunks, parts, strict=True)
            ]
            self._assert_output(outputs[-1], torch.cat(expected))
        self.check()
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
        for token in tokens:
            self._check_windows(token)
        self._check_flags(before, [expected for token in tokens for expected in token.expected])
        self.check()
        return tokens

    def plan_decode(self, requests: list[Request]) -> None:
        rows, lens = [request.row for request in requests], [request.length for request in requests]
        slots = self.req_to_token[self._tensor(rows), self._tensor(lens) - 1].long()
        self.retrieval.plan(self._tensor(rows), self._tensor(lens), slots, self.req_to_token, rows, lens)

    def run_decode(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.retrieval.run(layer, q, k, v, self.scale)

    def forget_blocks(self, pages: list[int]) -> None:
        """Evict every block of some pages."""
        num_kv_heads = self.geometry.num_kv_heads
        keys = [page * num_kv_heads + head for page in pages for head in range(num_kv_heads)]
        self.memory.blocks.release(KeyList(self._tensor(keys), self._tensor([len(keys)]).int()))

    def front(self, layer: int) -> torch.Tensor:
        """The windows `[max_requests + 1, H, W]` that the last step read."""
        return self.memory.windows.pages[int(self.memory.blocks.step) % 2, layer]

    def back(self, layer: int) -> torch.Tensor:
        """Those that the next step will read."""
        return self.memory.windows.pages[(int(self.memory.blocks.step) + 1) % 2, layer]

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    # Checks

    def check(self) -> None:
        """Invariants that hold after every step."""
        counters = self.memory.counters
        assert counters[Count.ABSENT_PAGES] == 0
        assert counters[Count.RECALLS] <= counters[Count.MISSES] + counters[Count.DEMAND_MISSES]
        self.memory.check_integrity()
        for request in self.requests:
            self._check_host_pages(request)

    def _assert_output(self, out: torch.Tensor, expected: torch.Tensor) -> None:
        assert out.dtype == self.geometry.dtype
        tolerance = OUTPUT_TOLERANCE[self.geometry.dtype]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)

    def _check_windows(self, token: DecodedToken) -> None:
        """Front and back windows follow the rule, their blocks hold the pages, and attention read them."""
        request = token.request
        for layer, (expected, out) in enumerate(zip(token.expected, token.outputs, strict=True)):
            q = request.trace.q[layer, request.length - 1]
            windows = expected.windows
            if layer not in self.rule.dense_layers:
                windows = self.window(self.front(layer), request)
                for head, choice in enumerate(zip(expected.windows, expected.scores, strict=True)):
                    difference = explain_difference(windows[head], *choice, self.score_tolerance)
                    assert not difference, difference
                self._check_back_windows(request, layer, q)
            self._check_blocks(request, layer, windows)
            self._assert_output(out, request.reference.attend(layer, q, windows, self.scale))

    def _check_back_windows(self, request: Request, layer: int, q: torch.Tensor) -> None:
        """The back windows are this query's choice at the next length."""
        for head, back in enumerate(self.window(self.back(layer), request)):
            expected, scores = request.reference.window(layer, head, q.double(), request.length + 1)
            # The page that the next token opens may be listed now or when it is opened.
            back, expected = ([page for page in x if page < len(request.pages)] for x in (back, expected))
            difference = explain_difference(back, expected, scores, self.score_tolerance)
            assert not difference, difference

    def window(self, windows: torch.Tensor, request: Request) -> list[list[int]]:
        """The pages of a request's window per KV head, of `windows [max_requests + 1, H, W]`."""
        pages = windows[request.row].tolist()
        lengths = [sum(page >= 0 for page in head) for head in pages]
        assert all(set(head[n:]) <= {-1} for head, n in zip(pages, lengths, strict=True)), "-1 before a page"
        return [head[:n] for head, n in zip(pages, lengths, strict=True)]

    def _check_blocks(self, request: Request, layer: int, windows: list[list[int]]) -> None:
        """The block of every window entry equals the host page and the keys that the reference remembers."""
        blocks, host = self.memory.blocks, self.memory.host
        for head, window in enumerate(windows):
            for logical in window:
                page = request.pages[logical]
                block = int(blocks.tables.table[layer, page, head])
                assert block >= 0, f"layer {layer}, head {head}: page {logical} of the window is not resident"
                num_tokens = min(self.page_size, request.length - logical * self.page_size)
                held = blocks.kv[layer][block][:, :num_tokens].cpu()
                assert held.equal(host.kv[page, layer, head][:, :num_tokens])
                assert held[0].double().equal(request.reference.page_keys(layer, head, logical))
                assert held[1].double().equal(request.reference.page_values(layer, head, logical))

    def _check_flags(self, before: dict[str, int], steps: list[Expected]) -> None:
        after = self.memory.counters.as_dict()
        corrected = sum(sum(step.flagged) for step in steps)
        rows = sum(len(step.flagged) for step in steps if step.over_budget)
        assert after["rows"] - before["rows"] == rows
        assert after["flagged_rows"] - before["flagged_rows"] == corrected
        self.corrected += corrected
        self.kept += rows - corrected

    def _check_host_pages(self, request: Request) -> None:
        """The host store holds every token of a request, the summaries their minimum and maximum.

        And the codes of a full page stand for what is less than half a step from its keys.
        """
        host, trace = self.memory.host, request.trace
        for logical, page in enumerate(request.pages):
            tokens = slice(logical * self.page_size, min((logical + 1) * self.page_size, request.length))
            num_tokens = tokens.stop - tokens.start
            assert int(host.filled[page]) == num_tokens
            keys, values = (x[:, tokens].transpose(1, 2) for x in (trace.k, trace.v))  # [L, H, tokens, D]
            assert host.kv[page, :, :, 0, :num_tokens].equal(keys)
            assert host.kv[page, :, :, 1, :num_tokens].equal(values)
            summary = host.summary[:, page].cpu()
            assert summary[:, :, 0].equal(keys.amin(dim=2))
            assert summary[:, :, 1].equal(keys.amax(dim=2))
            if self.geometry.key_bits and num_tokens == self.page_size:
                decoded, step = decode_keys(summary, host.codes[:, page])
                assert ((decoded - keys).abs() <= step * (0.5 + ROUNDING)).all(), f"codes of page {page}"
