"""How many requests of one length fit: in plain SGLang, and with KV retrieval. Sizes only; nothing here is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sglang_freekv.config import FreeKVConfig, UnsupportedConfiguration
from sglang_freekv.memory.geometry import Geometry, num_pages_of
from sglang_freekv.memory.plan import MemoryPlan, plan_memory
from sglang_freekv.memory.units import GIB

_CONTEXT_BYTES = GIB // 2  # taken by CUDA and its libraries before the weights are loaded
_STEP = 1024  # tokens, in which the context is told from which on there is a gain
_LENGTHS = (8192, 32768, 131072)  # tokens of requests that are always told, as far as the model takes them


@dataclass(frozen=True)
class Rank:
    """The memory of one rank beside its weights. Bytes, unless the name says otherwise."""

    geometry: Geometry
    plain_token_bytes: int  # KV of a token in plain SGLang, which pads no head
    device_bytes: int  # for KV, after weights and SGLang's own reserve
    host_bytes: int  # for the host store, where no flag sizes it
    max_requests: int  # SGLang's bound
    max_context: int | None = None  # tokens of a row of SGLang's request table, on a GPU
    attention_bytes: int = 0
    max_total_tokens: int | None = None

    def plan(self, config: FreeKVConfig) -> MemoryPlan:
        """What a server gives to its pools.

        Raises
        ------
        UnsupportedConfiguration
            If not even one request fits.
        """
        return plan_memory(
            self.geometry,
            config,
            device_bytes=self.device_bytes,
            host_bytes=self.host_bytes,
            max_requests=self.max_requests,
            max_total_tokens=self.max_total_tokens,
            max_context=self.max_context,
            attention_bytes=self.attention_bytes,
        )

    def holds_one(self, config: FreeKVConfig) -> bool:
        """Whether any request fits."""
        try:
            return self.plan(config).max_requests > 0
        except UnsupportedConfiguration:
            return False

    @property
    def plain_tokens(self) -> int:
        """KV that plain SGLang holds in the same memory."""
        tokens = max(self.device_bytes, 0) // self.plain_token_bytes
        return tokens if self.max_total_tokens is None else min(tokens, self.max_total_tokens)

    def plain_requests(self, length: int) -> int:
        """Requests of `length` tokens, answer included, that plain SGLang holds."""
        return min(self.plain_tokens // (pages_of(length, self.geometry) * self.geometry.page_size), self.max_requests)


@dataclass(frozen=True)
class Fit:
    """The most requests of one length, with a host store that is sized for them."""

    num_requests: int
    host_memory_gib: float  # of each rank, for --freekv-host-memory
    limit: str  # what the next request would not fit


@dataclass(frozen=True)
class Comparison:
    """How many requests of one length run at the same time."""

    length: int  # tokens of each, answer included
    plain: int
    planned: int  # with the plan as it is
    best: Fit


def free_before_weights(total_bytes: int) -> int:
    """Of a GPU, once CUDA and its libraries are loaded."""
    return total_bytes - _CONTEXT_BYTES


def pages_of(length: int, geometry: Geometry) -> int:
    """Of one request, with the page that its next token may open."""
    return num_pages_of(length, geometry.page_size) + 1


def planned_requests(plan: MemoryPlan, length: int) -> int:
    """Requests of `length` tokens that a plan runs at the same time."""
    return min(plan.max_requests, plan.num_pages // pages_of(length, plan.geometry))


def best_fit(rank: Rank, config: FreeKVConfig, length: int) -> Fit:
    """Size the host store for requests of one length: a larger one takes device memory for its summaries.

    A store that `config` sizes is left as it is.
    """
    if config.host_memory_gib is not None:
        num_requests = planned_requests(rank.plan(config), length) if rank.holds_one(config) else 0
        return Fit(num_requests, config.host_memory_gib, "device memory")
    low, high = 0, rank.max_requests + 1
    limit = "SGLang's --max-running-requests"
    while high - low > 1:
        middle = (low + high) // 2
        found = plan_for_requests(rank, config, length, middle)
        if isinstance(found, str):
            high, limit = middle, found
        else:
            low = middle
    return Fit(low, _store_gib(rank.geometry, length, low), limit)


def plan_for_requests(rank: Rank, config: FreeKVConfig, length: int, num_requests: int) -> MemoryPlan | str:
    """The plan that holds so many requests of one length, or what they do not fit."""
    gib = _store_gib(rank.geometry, length, num_requests)
    if gib * GIB > rank.host_bytes:
        return "host memory"
    try:
        plan = rank.plan(replace(config, host_memory_gib=gib))
    except UnsupportedConfiguration:  # not even one request
        return "device memory"
    return plan if planned_requests(plan, length) >= num_requests else "device memory"


def compare(rank: Rank, config: FreeKVConfig, plan: MemoryPlan, length: int) -> Comparison:
    """Requests of one length, side by side."""
    return Comparison(
        length, rank.plain_requests(length), planned_requests(plan, length), best_fit(rank, config, length)
    )


def told_lengths(length: int, context_len: int) -> list[int]:
    """Lengths that a report compares: the one that is asked for, and a few that everybody knows."""
    return sorted({length, *(known for known in _LENGTHS if known <= context_len)})


def gains_above(rank: Rank, config: FreeKVConfig, context_len: int) -> int | None:
    """Tokens from which on, up to the model's context, more requests fit than in plain SGLang; None: nowhere.

    In whole `_STEP`s.
    """
    found = None
    for length in reversed(range(_STEP, context_len + 1, _STEP)):
        if best_fit(rank, config, length).num_requests <= rank.plain_requests(length):
            break
        found = length
    return found


def _store_gib(geometry: Geometry, length: int, num_requests: int) -> float:
    """A host store for so many requests, and the page that is padding; rounded up to what a flag can say."""
    num_bytes = (num_requests * pages_of(length, geometry) + 1) * geometry.page_bytes
    return math.ceil(num_bytes / GIB * 100) / 100
