"""Which steps are measured: a few to calibrate by, and others that the calibration has not seen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.gpu.decode_cells import DEFAULT, EXACT, SPECULATION
from benchmarks.gpu.shapes import SHAPES, ModelShape
from sglang_freekv.config import FreeKVConfig

K = 1024
STEADY, MOVING = 0.02, 0.3  # drift of the queries: mean of 1 - cosine with the previous step's
BUDGET = 1 * K  # where a cell does not say otherwise
# Contexts and budgets are those of a CPU; a GPU, which is measured with a large model, gets more of both.
GPU_SCALE = 2
CPU_SHAPE = ModelShape(2, 256, 8, 2, 64, 512, 512, 33 * K)
GPU_SHAPE = SHAPES["llama-8b"]


@dataclass(frozen=True)
class Cell:
    """One measured step. `budget` None: plain SGLang; `windows` 0: device blocks for every page."""

    context: int
    batch: int
    budget: int | None = BUDGET
    tau: float = DEFAULT
    drift: float = STEADY
    windows: float = 0
    calibrates: bool = False
    selector: str = FreeKVConfig().selector_name

    @property
    def config(self) -> FreeKVConfig:
        """FreeKV's settings, of a cell with a budget."""
        return FreeKVConfig(budget_tokens=self.budget, tau=self.tau, selector=self.selector)

    def scaled(self, scale: int) -> Cell:
        """The same step with longer requests."""
        budget = None if self.budget is None else self.budget * scale
        return replace(self, context=self.context * scale, budget=budget)


def _plain(context: int, batch: int, calibrates: bool = False) -> Cell:
    return Cell(context, batch, None, calibrates=calibrates)


PLAIN = (
    *(_plain(context, batch, calibrates=True) for context, batch in ((1 * K, 1), (1 * K, 8), (8 * K, 1), (8 * K, 8))),
    *(_plain(context, batch) for context, batch in ((2 * K, 1), (2 * K, 8), (4 * K, 4), (16 * K, 1), (16 * K, 8))),
    *(_plain(context, batch) for context, batch in ((32 * K, 1), (32 * K, 8))),
)
# Where the model is calibrated little is recalled: the price of recalls is the link's, measured by itself.
FREEKV = (
    *(Cell(512, batch, calibrates=True) for batch in (1, 8)),  # within the budget
    *(Cell(2 * K, batch, calibrates=True) for batch in (1, 8)),
    *(Cell(8 * K, batch, tau=tau, calibrates=True) for batch, tau in ((1, SPECULATION), (8, SPECULATION), (8, EXACT))),
    *(Cell(context, batch) for context in (4 * K, 16 * K, 32 * K) for batch in (1, 8)),
    *(Cell(16 * K, 4, budget) for budget in (512, 2 * K, 4 * K)),
    *(Cell(16 * K, 4, tau=tau) for tau in (SPECULATION, EXACT)),
    # Few blocks and queries that move: pages are recalled.
    *(Cell(16 * K, 4, tau=tau, drift=MOVING, windows=2) for tau in (SPECULATION, DEFAULT)),
    *(Cell(32 * K, batch, drift=MOVING, windows=2) for batch in (1, 8)),
)


def cells(engine: str, device: str) -> list[Cell]:
    """Those of "plain" or "freekv", the ones that calibrate first."""
    scale = GPU_SCALE if device == "cuda" else 1
    chosen = sorted(PLAIN if engine == "plain" else FREEKV, key=lambda cell: not cell.calibrates)
    return [cell.scaled(scale) for cell in chosen]


def shape_for(device: str) -> ModelShape:
    return GPU_SHAPE if device == "cuda" else CPU_SHAPE
