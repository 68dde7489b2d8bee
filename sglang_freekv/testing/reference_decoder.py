"""A slow decoder that keeps every key and value of a request, and says what retrieval must do with them.

It shares no code with the engine: one tensor per layer, loops over heads and pages, float64. The
double buffer of the real decoder does not exist here; a window is chosen when it is needed, from the
query that the rule names, which is the same thing because only finished pages are candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_freekv.testing.reference_scores import ReferenceScores, Rule


@dataclass(frozen=True)
class Expected:
    """What one decode step of one layer must have done for one request."""

    windows: list[list[int]]  # per KV head: logical pages read by attention, ascending
    scores: list[dict[int, float]]  # per KV head: pooled score of every candidate, {} without a choice
    flagged: list[bool]  # per KV head: its window was chosen again with this step's query
    over_budget: bool
    due: list[bool]  # per KV head: it scored its pages, for this step's window and the next one's


@dataclass
class Pace:
    """When a KV head scores its pages."""

    interval: int = 1  # steps
    left: int = 0  # steps before it does
    was_due: bool = True  # in the step before; the prompt's last token was


class ReferenceRequest(ReferenceScores):
    """Every key and value of one request, and the windows that its decode steps must read."""

    def __init__(self, rule: Rule, budget_pages: int, mass: float | None = None) -> None:
        super().__init__(rule, budget_pages)
        self.mass = rule.mass if mass is None else mass
        self._sizes: dict[tuple[int, int, int], list[int]] = {}  # by layer, length and known tokens
        self.last_query: list[torch.Tensor | None] = [None] * rule.num_layers  # [Hq, D] float64
        self.read: list[list[list[int]]] = [[[]] * rule.num_kv_heads] * rule.num_layers  # windows of the last step
        self.paces = [[Pace() for _ in range(rule.num_kv_heads)] for _ in range(rule.num_layers)]

    def prefill(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append a chunk and return its causal attention over all that a layer's queries see, `[n, Hq, D]`."""
        self.remember(layer, k, v)
        self.last_query[layer] = q[-1].double()
        self.paces[layer] = [Pace() for _ in range(self.rule.num_kv_heads)]
        length = len(self.keys[layer])
        first = length - len(q)
        key, query = torch.arange(length)[None, :], torch.arange(first, length)[:, None]
        seen = (key <= query) & (key > query - (self.rule.sliding_window(layer) or length))
        out = torch.empty_like(q, dtype=torch.float64)
        for qo_head in range(self.rule.num_qo_heads):
            kv_head = qo_head // self.group_size
            logits = scale * q[:, qo_head].double() @ self.keys[layer][:, kv_head].T
            logits = self.capped(logits).masked_fill(~seen, -math.inf)
            weights = self.weights(logits, None if sinks is None else sinks[qo_head])
            out[:, qo_head] = weights @ self.values[layer][:, kv_head]
        return out

    def decode(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Expected:
        """Append one token (`q [Hq, D]`, `k, v [H, D]`) and say which windows its attention reads."""
        self.remember(layer, k[None], v[None])
        q, previous = q.double(), self.last_query[layer]
        self.last_query[layer] = q
        num_pages = math.ceil(len(self.keys[layer]) / self.rule.page_size)
        if layer in self.rule.dense_layers or self.rule.sliding_window(layer) is not None:
            first = max(len(self.keys[layer]) - (self.rule.sliding_window(layer) or math.inf), 0)
            pages = [list(range(int(first) // self.rule.page_size, num_pages)) for _ in range(self.rule.num_kv_heads)]
            return Expected(pages, [{} for _ in pages], [False] * len(pages), False, [False] * len(pages))
        over_budget = num_pages > self.budget_pages
        of_heads = [
            self.front_window(layer, kv_head, q, previous, self.read[layer][kv_head])
            for kv_head in range(self.rule.num_kv_heads)
        ]
        windows, scores, flagged, self.found[layer] = map(list, zip(*of_heads, strict=True))
        self.read[layer] = windows
        return Expected(windows, scores, flagged, over_budget, [pace.was_due for pace in self.paces[layer]])

    def front_window(
        self, layer: int, kv_head: int, q: torch.Tensor, previous: torch.Tensor, read: Sequence[int] = ()
    ) -> tuple[list[int], dict[int, float], bool, list[int]]:
        """The window of the latest token, the scores it was chosen by, whether it was by its own query `q`, and the
        window that the token before had chosen, which had `read` its own.
        """
        length, pace = len(self.keys[layer]), self.paces[layer][kv_head]
        window, scores = self.window(layer, kv_head, previous, length, length - 1, read)
        if not pace.was_due and scores:
            window = list(read)  # its pages were not scored, and no page was opened
        self._pass(pace, length)
        if not scores:
            return window, scores, False, window
        self.found[layer][kv_head] = window
        if not pace.was_due:
            return window, scores, False, window
        again, scores_again = self.window(layer, kv_head, q, length, length, window, len(window))
        if self.rule.gate is None:
            is_flagged = self.similarity(q, previous, kv_head) < self.rule.tau
        else:
            own = self.scores(layer, kv_head, q, scores_again, length)
            kept = [sum(math.exp(own[page]) for page in pages if page in own) for pages in (again, window)]
            is_flagged = kept[0] - kept[1] > self.rule.gate
            is_calm = kept[0] - kept[1] <= self.rule.gate / 2
            pace.interval = min(2 * pace.interval, self.rule.max_interval) if is_calm else 1
            pace.left = pace.interval - 1
        return (again, scores_again, True, window) if is_flagged else (window, scores, False, window)

    def _pass(self, pace: Pace, length: int) -> None:
        """A step passes, of the latest token: is the head due in it, for a next window that is over the budget?"""
        num_pages, num_next = (math.ceil(n / self.rule.page_size) for n in (length, length + 1))
        if num_next <= self.budget_pages:
            pace.was_due = True  # all pages are listed, scored or not
            return
        pace.was_due = pace.left == 0 or num_next > num_pages
        if not pace.was_due:
            pace.left -= 1
        elif num_pages <= self.budget_pages:
            pace.interval, pace.left = 1, 0

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        windows: list[list[int]],
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one query `[Hq, D]` over the tokens of a window per KV head, `[Hq, D]`; `sinks [Hq]`."""
        out = torch.empty_like(q, dtype=torch.float64)
        for qo_head in range(self.rule.num_qo_heads):
            kv_head = qo_head // self.group_size
            keys = torch.cat([self.page_keys(layer, kv_head, page) for page in windows[kv_head]])
            values = torch.cat([self.page_values(layer, kv_head, page) for page in windows[kv_head]])
            seen = slice(-(self.rule.sliding_window(layer) or len(keys)), None)
            logits = self.capped(scale * keys[seen] @ q[qo_head].double())
            out[qo_head] = self.weights(logits, None if sinks is None else sinks[qo_head]) @ values[seen]
        return out

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits as the model has them."""
        cap = self.rule.logit_cap
        return cap * (logits / cap).tanh() if cap else logits

    @staticmethod
    def weights(logits: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
        """Softmax of `[..., keys]`, with one logit more whose weight is dropped."""
        if sink is None:
            return logits.softmax(dim=-1)
        with_sink = torch.cat((logits, sink.double().expand(*logits.shape[:-1], 1)), dim=-1)
        return with_sink.softmax(dim=-1)[..., :-1]

    def window(
        self,
        layer: int,
        kv_head: int,
        q: torch.Tensor,
        length: int,
        known: int,
        present: Sequence[int] = (),
        size: int | None = None,
    ) -> tuple[list[int], dict[int, float]]:
        """The window that query `q [Hq, D]` chooses for a length, and the scores it was chosen by.

        `known` tokens are written when it chooses. Pages of the `present` window, where there is one, are favoured.
        The query also says how many pages there are, unless `size` does.
        """
        num_pages = math.ceil(length / self.rule.page_size)
        if num_pages <= self.budget_pages:
            return list(range(num_pages)), {}
        sink, first_recent = self.rule.sink_pages, num_pages - self.rule.recent_pages
        scores = self.scores(layer, kv_head, q, range(sink, first_recent), known)
        scores = {page: score + self.rule.hysteresis * (page in present) for page, score in scores.items()}
        if size is None:
            size = self.sizes(layer, q, length, known)[kv_head]
        num_selected = size - sink - self.rule.recent_pages
        best = sorted(scores, key=scores.get, reverse=True)[:num_selected]
        return [*range(sink), *sorted(best), *range(first_recent, num_pages)], scores

    def sizes(self, layer: int, q: torch.Tensor, length: int, known: int) -> list[int]:
        """Pages of each head's window that `q [Hq, D]`, of the last known token, asks for beyond the budget's pages."""
        if (layer, length, known) not in self._sizes:
            self._sizes[layer, length, known] = self._new_sizes(layer, q, length, known)
        return self._sizes[layer, length, known]

    def _new_sizes(self, layer: int, q: torch.Tensor, length: int, known: int) -> list[int]:
        num_pages, heads = math.ceil(length / self.rule.page_size), range(self.rule.num_kv_heads)
        fixed = self.rule.sink_pages + self.rule.recent_pages
        room = self.budget_pages - fixed
        if self.mass == 0 or room == 0:
            return [self.budget_pages for _ in heads]
        candidates = range(self.rule.sink_pages, num_pages - self.rule.recent_pages)
        of_heads = [sorted(self.scores(layer, h, q, candidates, known).values(), reverse=True) for h in heads]
        counts = []
        for shares in of_heads:
            most = min(self.rule.times * room, num_pages - 1 - fixed, len(shares))
            left_out, count = sum(math.exp(share) for share in shares[1:]), 1
            while left_out > 1 - self.mass and count < most:
                left_out -= math.exp(shares[count])
                count += 1
            counts.append(count)
        while sum(counts) > len(heads) * room:
            shares = {h: of_heads[h][counts[h] - 1] for h in heads if counts[h] > 1}
            counts[min(shares, key=shares.get)] -= 1
        return [fixed + count for count in counts]


def explain_difference(
    window: list[int], expected: list[int], scores: dict[int, float], tolerance: float
) -> str | None:
    """Say why a window is wrong, or None where it equals the expected one up to scores within `tolerance`."""
    if window == expected:
        return None
    extra, missing = set(window) - set(expected), set(expected) - set(window)
    if sorted(set(window)) != window or len(extra) != len(missing) or not (extra | missing) <= set(scores):
        return f"window {window} is not of the expected form {expected}"
    margin = max(scores[page] for page in missing) - min(scores[page] for page in extra)
    if margin <= tolerance:
        return None
    return f"window {window} has {sorted(extra)} instead of {sorted(missing)}, worse by {margin:.3g}"
