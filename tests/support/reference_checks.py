"""What holds after every prefill chunk and decode step of a simulated engine.

Windows, outputs, device blocks, host pages, summaries and codes against `reference_decoder`, and the counters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from freekv_kernels import GROUP_PAGES, Count
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.testing.reference_decoder import Expected, ReferenceRequest, explain_difference
from sglang_freekv.testing.reference_scores import Rule
from tests.support import fp8
from tests.support.op_tables import decode_keys
from tests.support.random_traces import Trace

OUTPUT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # bf16: 8 bits of a result of magnitude <= 4
SCORE_TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 1e-3}  # scores are of magnitude 10 to 100
CODES_TOLERANCE = 2e-2  # instead of 1e-3: a GPU rounds what codes stand for to 11 bits
ROUNDING = 1e-6  # of a code, relative to a step


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
    def groups(self) -> torch.Tensor:
        """Host pages of its groups of pages: int64 `[n, GROUP_PAGES]`."""
        return torch.tensor(self.pages[: len(self.pages) // GROUP_PAGES * GROUP_PAGES]).view(-1, GROUP_PAGES)

    @property
    def is_decoding(self) -> bool:
        return self.length >= self.prompt_tokens


@dataclass(frozen=True)
class DecodedToken:
    """One decode step of one request: per layer, what was expected, and the output `[Hq, D]` of attention."""

    request: Request
    expected: list[Expected]
    outputs: list[torch.Tensor]


class ReferenceChecks:
    """Holds the memory of an engine against what the reference says of its requests."""

    def __init__(self, memory: KVMemory, rule: Rule, sinks: torch.Tensor | None = None) -> None:
        g = memory.geometry
        self.sinks = sinks  # float32 [num_layers, Hq]
        self.memory, self.rule, self.page_size = memory, rule, g.page_size
        has_rounded_scores = g.key_bits > 0 and g.dtype != torch.float32
        self._score_tolerance = CODES_TOLERANCE if has_rounded_scores else SCORE_TOLERANCE[g.dtype]

    def invariants(self, requests: list[Request]) -> None:
        """They hold after every step."""
        counters = self.memory.counters
        assert counters[Count.ABSENT_PAGES] == 0
        if not self.memory.config.refetch:
            assert counters[Count.RECALLS] <= counters[Count.MISSES] + counters[Count.DEMAND_MISSES]
        self.memory.check_integrity()
        for request in requests:
            self.host_pages(request)

    def output(self, out: torch.Tensor, expected: torch.Tensor) -> None:
        assert out.dtype == self.memory.geometry.dtype
        tolerance = OUTPUT_TOLERANCE[self.memory.geometry.dtype]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)

    def windows(self, token: DecodedToken, front: torch.Tensor, back: torch.Tensor) -> None:
        """Front and back windows follow the rule, their blocks hold the pages, and attention read them.

        `front` and `back` are the windows of all layers and rows, ``[num_layers, max_requests + 1, H, W]``.
        """
        request = token.request
        for layer, (expected, out) in enumerate(zip(token.expected, token.outputs, strict=True)):
            q = request.trace.q[layer, request.length - 1]
            windows = expected.windows
            if self.memory.kinds[layer].selects:
                place = self.memory.geometry.full_layers.index(layer)
                windows = window_of(front[place], request)
                for head, choice in enumerate(zip(expected.windows, expected.scores, strict=True)):
                    difference = explain_difference(windows[head], *choice, self._score_tolerance)
                    assert not difference, difference
                self._back_windows(request, layer, back[place], q, windows, expected.due)
            self._blocks(request, layer, windows)
            sinks = None if self.sinks is None else self.sinks[layer]
            self.output(out, request.reference.attend(layer, q, windows, self.rule.scale, sinks))

    def _back_windows(
        self,
        request: Request,
        layer: int,
        windows: torch.Tensor,
        q: torch.Tensor,
        present: list[list[int]],
        due: list[bool],
    ) -> None:
        """The back windows are this query's choice at the next length, beside those that were read, or these."""
        for head, back in enumerate(window_of(windows, request)):
            if not due[head]:
                assert back == present[head]
                continue
            lengths = (request.length + 1, request.length)
            expected, scores = request.reference.window(layer, head, q.double(), *lengths, present[head])
            # The page that the next token opens may be listed now or when it is opened.
            back, expected = ([page for page in x if page < len(request.pages)] for x in (back, expected))
            difference = explain_difference(back, expected, scores, self._score_tolerance)
            assert not difference, difference

    def _blocks(self, request: Request, layer: int, windows: list[list[int]]) -> None:
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

    def flags(self, before: dict[str, int], steps: list[Expected]) -> tuple[int, int]:
        """The counters say how many over-budget rows were corrected, and how many not; returned."""
        after = self.memory.counters.as_dict()
        corrected = sum(sum(step.flagged) for step in steps)
        rows = sum(len(step.flagged) for step in steps if step.over_budget)
        assert after["rows"] - before["rows"] == rows
        assert after["flagged_rows"] - before["flagged_rows"] == corrected
        read = [len(window) for step in steps if step.over_budget for window in step.windows]
        assert after["pages_read"] - before["pages_read"] == sum(read)
        return corrected, rows - corrected

    def host_pages(self, request: Request) -> None:
        """The host store holds every token of a request, the summaries their minimum and maximum, rounded outwards.

        Where pages are chosen by mass, the page that ends a group has those of the group. And the codes of a full page
        stand for what is less than half a step from its keys.
        """
        host, trace, full = self.memory.host, request.trace, list(self.memory.geometry.full_layers)
        for logical, page in enumerate(request.pages):
            tokens = slice(logical * self.page_size, min((logical + 1) * self.page_size, request.length))
            num_tokens = tokens.stop - tokens.start
            assert int(host.filled[page]) == num_tokens
            keys, values = (x[:, tokens].transpose(1, 2) for x in (trace.k, trace.v))  # [L, H, tokens, D]
            assert host.kv[page, :, :, 0, :num_tokens].equal(keys)
            assert host.kv[page, :, :, 1, :num_tokens].equal(values)
            summary, keys = self.memory.index.summaries[:, page].cpu(), keys[full]
            known = keys
            if self.rule.candidates and logical % GROUP_PAGES == GROUP_PAGES - 1 and num_tokens == self.page_size:
                known = trace.k[full, tokens.stop - GROUP_PAGES * self.page_size : tokens.stop].transpose(1, 2)
            assert summary.equal(fp8.bounds(torch.stack((known.amin(dim=2), known.amax(dim=2)), 2)))
            if self.memory.geometry.key_bits and num_tokens == self.page_size:
                decoded, step = decode_keys(summary, self.memory.index.codes[:, page])
                assert ((decoded - keys).abs() <= step * (0.5 + ROUNDING)).all(), f"codes of page {page}"


class WithoutWindows(ReferenceChecks):
    """All but the reference's choice of pages; counters and outputs hang on it too."""

    def windows(self, *_) -> None: ...
    def flags(self, *_) -> tuple[int, int]:
        return 0, 0


def window_of(windows: torch.Tensor, request: Request) -> list[list[int]]:
    """The pages of a request's window per KV head, of `windows [max_requests + 1, H, W]`."""
    pages = windows[request.row].tolist()
    lengths = [sum(page >= 0 for page in head) for head in pages]
    assert all(set(head[n:]) <= {-1} for head, n in zip(pages, lengths, strict=True)), "-1 before a page"
    return [head[:n] for head, n in zip(pages, lengths, strict=True)]
