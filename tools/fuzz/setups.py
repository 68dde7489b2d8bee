"""Small engines that differ in what matters to the memory side."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sglang_freekv.config import BASELINES, FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.windows import WindowSizes

PAGE_SIZE = 16  # the smallest
MAX_PAGES = 12  # of one request
MAX_TOKENS = MAX_PAGES * PAGE_SIZE


@dataclass(frozen=True)
class Setup:
    """Sizes of an engine; by default as few device blocks as can work."""

    name: str
    geometry: Geometry
    config: FreeKVConfig
    max_requests: int = 3
    num_pages: int = 28  # of the host store: fewer than the requests and the tree want
    num_blocks: int | None = None
    first_step: int = 0

    def __repr__(self) -> str:
        return self.name

    @property
    def blocks(self) -> int:
        windows = 2 * WindowSizes.of(self.config, PAGE_SIZE).max_budget * self.geometry.num_kv_heads * self.max_requests
        return self.num_blocks or windows


_GEOMETRY = Geometry(
    num_layers=1,
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim=8,
    dtype=torch.float32,
    page_size=PAGE_SIZE,
    key_bits=2,
)
_CONFIG = FreeKVConfig(
    budget_tokens=3 * PAGE_SIZE,
    max_budget_tokens=4 * PAGE_SIZE,
    sink_tokens=PAGE_SIZE,
    recent_tokens=PAGE_SIZE,
    arena_tokens=3 * PAGE_SIZE,
    key_bits=2,
    hysteresis=0.0,  # what a window should be is found without the window before it
    page_size=PAGE_SIZE,
)
_CODES = replace(_CONFIG, selector="codes")
TIGHT = Setup("tight", _GEOMETRY, _CONFIG)
SETUPS = (
    TIGHT,
    Setup(
        "dense first layer, by bounds",
        replace(_GEOMETRY, num_layers=2, key_bits=0),
        replace(_CONFIG, key_bits=0, dense_layers=(0,), tau=2.0),
        max_requests=2,
    ),
    Setup(
        "no sink, two recent pages",
        replace(_GEOMETRY, key_bits=1),
        replace(_CODES, key_bits=1, sink_tokens=0, recent_tokens=2 * PAGE_SIZE, group_pooling="max", tau=-1.0),
        max_requests=4,
        num_pages=36,
    ),
    Setup(
        "everything resident, two levels",
        _GEOMETRY,
        replace(_CONFIG, sink_tokens=0, candidates=2, hysteresis=0.5),
        num_blocks=29 * 2,
    ),
    Setup(
        "budgets by mass",
        replace(_GEOMETRY, num_layers=2, num_kv_heads=4),
        replace(_CONFIG, mass=0.6, sink_tokens=0, budget_tokens=4 * PAGE_SIZE, max_budget_tokens=5 * PAGE_SIZE),
    ),
    Setup(
        "stamps end, scored at intervals",
        _GEOMETRY,
        replace(_CONFIG, score_interval=4, gate=0.2),
        first_step=(1 << 29) - 12,
    ),
)
# Those that are compared with: what they keep of a request must survive whatever happens to others.
BASELINE_SETUPS = tuple(
    Setup(name, replace(_GEOMETRY, num_layers=2, key_bits=0), replace(_CONFIG, key_bits=0, selector=name, tau=tau))
    for name, tau in zip(BASELINES, (-1.0, 0.9, 0.9, 0.9, 2.0), strict=True)
)
