"""A slow decoder that keeps every key and value of a request, and says what retrieval must do with them.

It shares no code with the engine: one tensor per layer, loops over heads and pages, float64. The
double buffer of the real decoder does not exist here; a window is chosen when it is needed, from the
query that the rule names, which is the same thing because only finished pages are candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_freekv.testing.reference_codes import coarse, outwards

if TYPE_CHECKING:
    from sglang_freekv.memory.kv_memory import KVMemory


@dataclass(frozen=True)
class Rule:
    """What is fixed for all requests: the model's heads, and the retrieval rule in pages."""

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    sink_pages: int
    recent_pages: int
    tau: float | None
    gate: float | None  # instead of tau: share of the attention that a window may lose
    pooling: str  # "softmax", "scaled", "max" or "mean"
    scale: float  # of attention's logits
    page_size: int
    key_bits: int  # pages are scored by their keys in this many bits; 0: by their minimum and maximum
    by_mass: bool  # by what all tokens of a page get, instead of by its best one
    hysteresis: float  # what a page of the present window scores more
    candidates: int  # pages whose keys are read for each one that is selected; 0: all
    num_listed: int | None  # pages up to which the keys of all are read; None: always
    mass: float  # share of the attention that a window is to hold, of a request that asks for none; 0: its budget
    times: int  # most pages that a head selects, for each that its budget has room for
    dense_layers: tuple[int, ...] = ()

    @classmethod
    def of(cls, memory: KVMemory) -> Rule:
        """The rule that an engine's memory was built for, with the usual scale of the logits."""
        g, config, sizes = memory.geometry, memory.config, memory.sizes
        return cls(
            num_layers=g.num_layers,
            num_qo_heads=g.num_qo_heads,
            num_kv_heads=g.num_kv_heads,
            sink_pages=sizes.sink,
            recent_pages=sizes.recent,
            tau=config.min_cosine,
            gate=config.max_lost_share,
            pooling=config.pooling,
            scale=1 / math.sqrt(g.head_dim),
            page_size=g.page_size,
            key_bits=g.key_bits,
            by_mass=config.selector_name == "mass",
            hysteresis=config.bonus,
            candidates=config.num_candidates,
            num_listed=sizes.num_listed(config.num_candidates, memory.max_pages),
            mass=config.mass or 0.0,
            times=sizes.times,
            dense_layers=config.dense_layers,
        )


@dataclass(frozen=True)
class Expected:
    """What one decode step of one layer must have done for one request."""

    windows: list[list[int]]  # per KV head: logical pages read by attention, ascending
    scores: list[dict[int, float]]  # per KV head: pooled score of every candidate, {} without a choice
    flagged: list[bool]  # per KV head: its window was chosen again with this step's query
    over_budget: bool


class ReferenceRequest:
    """Every key and value of one request, and the windows that its decode steps must read."""

    def __init__(self, rule: Rule, budget_pages: int, mass: float | None = None) -> None:
        self.rule = rule
        self.budget_pages = budget_pages
        self.mass = rule.mass if mass is None else mass
        self._sizes: dict[tuple[int, int, int], list[int]] = {}  # by layer, length and known tokens
        self.keys: list[torch.Tensor | None] = [None] * rule.num_layers  # [length, H, D] float64
        self.values: list[torch.Tensor | None] = [None] * rule.num_layers
        self.last_query: list[torch.Tensor | None] = [None] * rule.num_layers  # [Hq, D] float64
        self.read: list[list[list[int]]] = [[[]] * rule.num_kv_heads] * rule.num_layers  # windows of the last step

    def remember(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append keys and values `[n, H, D]` of tokens that follow those already known."""
        k, v = k.double(), v.double()
        if self.keys[layer] is not None:
            k, v = torch.cat([self.keys[layer], k]), torch.cat([self.values[layer], v])
        self.keys[layer], self.values[layer] = k, v

    def prefill(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Append a chunk and return the causal attention of its queries over everything, `[n, Hq, D]`."""
        self.remember(layer, k, v)
        self.last_query[layer] = q[-1].double()
        length = len(self.keys[layer])
        first = length - len(q)
        seen = torch.arange(length)[None, :] <= torch.arange(first, length)[:, None]
        out = torch.empty_like(q, dtype=torch.float64)
        for qo_head in range(self.rule.num_qo_heads):
            kv_head = qo_head // self.group_size
            logits = scale * q[:, qo_head].double() @ self.keys[layer][:, kv_head].T
            weights = logits.masked_fill(~seen, -math.inf).softmax(dim=-1)
            out[:, qo_head] = weights @ self.values[layer][:, kv_head]
        return out

    def decode(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Expected:
        """Append one token (`q [Hq, D]`, `k, v [H, D]`) and say which windows its attention reads."""
        self.remember(layer, k[None], v[None])
        q, previous = q.double(), self.last_query[layer]
        self.last_query[layer] = q
        num_pages = math.ceil(len(self.keys[layer]) / self.rule.page_size)
        if layer in self.rule.dense_layers:
            every_page = [list(range(num_pages)) for _ in range(self.rule.num_kv_heads)]
            return Expected(every_page, [{} for _ in every_page], [False] * len(every_page), False)
        over_budget = num_pages > self.budget_pages
        of_heads = [
            self.front_window(layer, kv_head, q, previous, self.read[layer][kv_head])
            for kv_head in range(self.rule.num_kv_heads)
        ]
        windows, scores, flagged = map(list, zip(*of_heads, strict=True))
        self.read[layer] = windows
        return Expected(windows, scores, flagged, over_budget)

    def front_window(
        self, layer: int, kv_head: int, q: torch.Tensor, previous: torch.Tensor, read: Sequence[int] = ()
    ) -> tuple[list[int], dict[int, float], bool]:
        """The window of the latest token, the scores it was chosen by, and whether it was by its own query `q`.

        By that of the token before otherwise, when that token had `read` its window.
        """
        length = len(self.keys[layer])
        window, scores = self.window(layer, kv_head, previous, length, length - 1, read)
        if not scores:
            return window, scores, False
        again, scores_again = self.window(layer, kv_head, q, length, length, window, len(window))
        if self.rule.gate is None:
            is_flagged = self.similarity(q, previous, kv_head) < self.rule.tau
        else:
            own = self.scores(layer, kv_head, q, scores_again, length)
            kept = [sum(math.exp(own[page]) for page in pages if page in own) for pages in (again, window)]
            is_flagged = kept[0] - kept[1] > self.rule.gate
        return (again, scores_again, True) if is_flagged else (window, scores, False)

    def attend(self, layer: int, q: torch.Tensor, windows: list[list[int]], scale: float) -> torch.Tensor:
        """Attention of one query `[Hq, D]` over the tokens of a window per KV head, `[Hq, D]`."""
        out = torch.empty_like(q, dtype=torch.float64)
        for qo_head in range(self.rule.num_qo_heads):
            kv_head = qo_head // self.group_size
            keys = torch.cat([self.page_keys(layer, kv_head, page) for page in windows[kv_head]])
            values = torch.cat([self.page_values(layer, kv_head, page) for page in windows[kv_head]])
            weights = (scale * keys @ q[qo_head].double()).softmax(dim=0)
            out[qo_head] = weights @ values
        return out

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

    def scores(
        self, layer: int, kv_head: int, q: torch.Tensor, candidates: Iterable[int], known: int
    ) -> dict[int, float]:
        """Pooled score of each candidate page; that of a softmax is its logarithm."""
        group = q[kv_head * self.group_size : (kv_head + 1) * self.group_size].double()
        if self.rule.by_mass:
            return self.shares(layer, kv_head, group, candidates, known)
        raw = [self.page_scores(layer, kv_head, group, page) for page in candidates]
        raw = torch.stack(raw, dim=1)  # [group_size, candidates]
        if self.rule.pooling == "mean":
            pooled = raw.mean(dim=0)
        else:
            scale = 1.0 if self.rule.pooling == "softmax" else self.rule.scale
            shares = (scale * raw).log_softmax(dim=1)
            is_max = self.rule.pooling == "max"
            pooled = shares.amax(dim=0) if is_max else shares.logsumexp(dim=0) - math.log(self.group_size)
        return dict(zip(candidates, pooled.tolist(), strict=True))

    def shares(
        self, layer: int, kv_head: int, group: torch.Tensor, candidates: Iterable[int], known: int
    ) -> dict[int, float]:
        """Logarithm of the candidates' mean share of the attention of `group [group_size, D]` to the `known` tokens."""
        last = (known - 1) // self.rule.page_size
        listed = self.listed_pages(layer, kv_head, group, last + 1)
        masses = [self.page_scores(layer, kv_head, group, page) for page in listed if page != last]
        newest = self.keys[layer][last * self.rule.page_size : known, kv_head]
        masses.append((self.rule.scale * group @ newest.T).logsumexp(dim=1))
        pooled = torch.stack(masses, dim=1).log_softmax(dim=1).logsumexp(dim=0) - math.log(self.group_size)
        shares = dict(zip(listed, pooled.tolist(), strict=True))
        return {page: shares[page] for page in candidates if page in shares}

    def listed_pages(self, layer: int, kv_head: int, group: torch.Tensor, num_pages: int) -> list[int]:
        """The pages with whose keys those of `group [group_size, D]` are compared: of the best groups of four."""
        sink, recent, most = self.rule.sink_pages, self.rule.recent_pages, self.rule.num_listed
        if most is None or num_pages <= most:
            return list(range(num_pages))
        between = range(math.ceil(sink / 4), (num_pages - recent) // 4)
        scores = torch.stack([self.group_scores(layer, kv_head, group, number) for number in between], dim=1)
        pooled = scores.log_softmax(dim=1).logsumexp(dim=0)
        wanted = math.ceil(self.rule.candidates * (self.budget_pages - sink - recent) / 4)
        fitting = (most - num_pages + 4 * len(between)) // 4
        best = [between[i] for i in pooled.topk(min(wanted, fitting)).indices]
        best = [*range(between.start), *sorted(best), *range(between.stop, math.ceil(num_pages / 4))]
        return [page for number in best for page in range(4 * number, 4 * number + 4) if page < num_pages]

    def group_scores(self, layer: int, kv_head: int, group: torch.Tensor, number: int) -> torch.Tensor:
        """Score of four pages for each query of `group [group_size, D]`: the middle of their bounds, and some width."""
        keys = torch.cat([self.page_keys(layer, kv_head, 4 * number + i) for i in range(4)])
        low, high = outwards(keys.amin(dim=0), keys.amax(dim=0))
        return self.rule.scale * (group @ (low + high) / 2 + group.abs() @ (high - low) / 4)

    def page_scores(self, layer: int, kv_head: int, group: torch.Tensor, page: int) -> torch.Tensor:
        """Score of a page for each query of `group [group_size, D]`."""
        keys = known = self.page_keys(layer, kv_head, page)
        if self.rule.by_mass and page % 4 == 3:  # its range is that of the four pages that it ends
            known = torch.cat([self.page_keys(layer, kv_head, page - i) for i in range(4)])
        low, high = outwards(known.amin(dim=0), known.amax(dim=0))
        if self.rule.key_bits == 0:
            return torch.maximum(group * low, group * high).sum(dim=1)
        assert len(keys) == self.rule.page_size, "a page that is not full is no candidate"
        logits = group @ coarse(keys, low, high, 2**self.rule.key_bits).T
        return (self.rule.scale * logits).logsumexp(dim=1) if self.rule.by_mass else logits.amax(dim=1)

    def similarity(self, q: torch.Tensor, previous: torch.Tensor, kv_head: int) -> float:
        """Mean over the query heads of a KV head of the cosine between two queries `[Hq, D]`."""
        cosines = []
        for qo_head in range(kv_head * self.group_size, (kv_head + 1) * self.group_size):
            a, b = q[qo_head], previous[qo_head]
            cosines.append(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
        return sum(cosines) / len(cosines)

    def page_keys(self, layer: int, kv_head: int, page: int) -> torch.Tensor:
        """Keys of one logical page, `[tokens, D]`; the last page may be partial."""
        return self.keys[layer][self.tokens_of(page), kv_head]

    def page_values(self, layer: int, kv_head: int, page: int) -> torch.Tensor:
        """Values of one logical page, `[tokens, D]`."""
        return self.values[layer][self.tokens_of(page), kv_head]

    def tokens_of(self, page: int) -> slice:
        return slice(page * self.rule.page_size, (page + 1) * self.rule.page_size)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.rule.num_qo_heads // self.rule.num_kv_heads


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
