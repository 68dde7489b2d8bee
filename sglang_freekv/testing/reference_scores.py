"""What a request's queries make of its pages, and the rule that they are chosen by: see `reference_decoder`."""

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
    max_interval: int  # steps after which a head scores its pages again, at most
    candidates: int  # pages whose keys are read for each one that is selected; 0: all
    num_listed: int | None  # pages up to which the keys of all are read; None: always
    mass: float  # share of the attention that a window is to hold, of a request that asks for none; 0: its budget
    times: int  # most pages that a head selects, for each that its budget has room for
    dense_layers: tuple[int, ...] = ()
    sliding_windows: tuple[int | None, ...] = ()  # tokens that a query sees in each layer; None or empty: all
    logit_cap: float = 0.0

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
            max_interval=config.score_interval,
            candidates=config.candidates,
            num_listed=sizes.num_listed(config.candidates, memory.max_pages),
            mass=config.mass or 0.0,
            times=sizes.times,
            dense_layers=config.dense_layers,
            sliding_windows=g.sliding_windows,
            logit_cap=g.logit_cap,
        )

    def sliding_window(self, layer: int) -> int | None:
        """Tokens that a query sees in a layer, its own included; None: all."""
        return self.sliding_windows[layer] if self.sliding_windows else None


class ReferenceScores:
    """Every key and value of one request, and how its pages are scored."""

    def __init__(self, rule: Rule, budget_pages: int) -> None:
        self.rule = rule
        self.budget_pages = budget_pages
        self.keys: list[torch.Tensor | None] = [None] * rule.num_layers  # [length, H, D] float64
        self.values: list[torch.Tensor | None] = [None] * rule.num_layers
        self._coarse: dict[tuple[int, int, int], torch.Tensor] = {}  # by layer, KV head and page
        self.found = [[[]] * rule.num_kv_heads for _ in range(rule.num_layers)]  # windows before correction

    def remember(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append keys and values `[n, H, D]` of tokens that follow those already known."""
        k, v = k.double(), v.double()
        if self.keys[layer] is not None:
            k, v = torch.cat([self.keys[layer], k]), torch.cat([self.values[layer], v])
        self.keys[layer], self.values[layer] = k, v

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
        listed = self.listed_pages(layer, kv_head, group, last + 1, self.found[layer][kv_head])
        masses = [self.page_scores(layer, kv_head, group, page) for page in listed if page != last]
        newest = self.keys[layer][last * self.rule.page_size : known, kv_head]
        masses.append((self.rule.scale * group @ newest.T).logsumexp(dim=1))
        pooled = torch.stack(masses, dim=1).log_softmax(dim=1).logsumexp(dim=0) - math.log(self.group_size)
        shares = dict(zip(listed, pooled.tolist(), strict=True))
        return {page: shares[page] for page in candidates if page in shares}

    def listed_pages(
        self, layer: int, kv_head: int, group: torch.Tensor, num_pages: int, present: Sequence[int]
    ) -> list[int]:
        """The pages with whose keys those of `group [group_size, D]` are compared: of the best groups of four."""
        sink, recent, most = self.rule.sink_pages, self.rule.recent_pages, self.rule.num_listed
        if most is None or num_pages <= most:
            return list(range(num_pages))
        between = range(math.ceil(sink / 4), (num_pages - recent) // 4)
        scores = torch.stack([self.group_scores(layer, kv_head, group, number) for number in between], dim=1)
        is_present = torch.tensor([any(page // 4 == number for page in present) for number in between])
        pooled = scores.log_softmax(dim=1).logsumexp(dim=0) + 1000 * is_present
        wanted = math.ceil(self.rule.candidates * (self.budget_pages - sink - recent) / 4)
        fitting = (most - num_pages + 4 * len(between)) // 4
        best = [between[i] for i in pooled.topk(min(wanted, fitting)).indices]
        best = [*range(between.start), *sorted(best), *range(between.stop, math.ceil(num_pages / 4))]
        return [page for number in best for page in range(4 * number, 4 * number + 4) if page < num_pages]

    def group_scores(self, layer: int, kv_head: int, group: torch.Tensor, number: int) -> torch.Tensor:
        """Score of four pages for each query of `group [group_size, D]`: the middle of their bounds, and some width."""
        low, high = self.bounds(layer, kv_head, range(4 * number, 4 * number + 4))
        return self.rule.scale * (group @ (low + high) / 2 + group.abs() @ (high - low) / 4)

    def page_scores(self, layer: int, kv_head: int, group: torch.Tensor, page: int) -> torch.Tensor:
        """Score of a page for each query of `group [group_size, D]`."""
        if self.rule.key_bits == 0:
            low, high = self.bounds(layer, kv_head, range(page, page + 1))
            return torch.maximum(group * low, group * high).sum(dim=1)
        logits = group @ self.coarse_keys(layer, kv_head, page).T
        return (self.rule.scale * logits).logsumexp(dim=1) if self.rule.by_mass else logits.amax(dim=1)

    def coarse_keys(self, layer: int, kv_head: int, page: int) -> torch.Tensor:
        """What the codes of a full page stand for, `[page_size, D]`; found once, as its keys stay."""
        if (layer, kv_head, page) not in self._coarse:
            keys = self.page_keys(layer, kv_head, page)
            assert len(keys) == self.rule.page_size, "a page that is not full is no candidate"
            ends_group = self.rule.candidates and page % 4 == 3  # its range is that of the four pages that it ends
            bounds = self.bounds(layer, kv_head, range(page - 3 if ends_group else page, page + 1))
            self._coarse[layer, kv_head, page] = coarse(keys, *bounds, 2**self.rule.key_bits)
        return self._coarse[layer, kv_head, page]

    def bounds(self, layer: int, kv_head: int, pages: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Minimum and maximum `[D]` of the keys of some pages, as FP8 has them."""
        keys = self.keys[layer][self.tokens_of(pages[0]).start : self.tokens_of(pages[-1]).stop, kv_head]
        return outwards(keys.amin(dim=0), keys.amax(dim=0))

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
