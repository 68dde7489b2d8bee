"""The time of one decode step: what is read, at which rate, and what hides behind it.

    busy   = step + layers * (layer + requests * request) + max(weights / memory, operations / flops)
             + KV or window / attention rate + pages' codes / scoring rate + selections
    step   = max(busy, hidden recalls / link) + exposed recalls / link + hidden recalls of the last layer / link

Recalls for the next step run on a second stream beside the layers that follow, but scoring on that stream reads the
memory that everybody reads, so it counts as busy. What a corrected row recalls is waited for: exposed. The last layer's
recalls have no layer to hide behind (DESIGN.md, "The tail"). On a CPU nothing hides.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cost_model.machine import Kernels, Machine
from benchmarks.cost_model.model import Model
from sglang_freekv.memory.page_indexes import INDEXES


@dataclass(frozen=True)
class Setting:
    """A decode step: requests of equal length, and the traffic that retrieval meets."""

    context: int  # tokens of each request
    batch: int  # requests
    budget: int | None = None  # tokens that a request attends to; None: plain SGLang
    page_size: int = 32
    key_bits: int = 2
    tau: float = 0.9
    flagged_share: float = 0.0  # of the rows, corrected; counts where tau is neither -1 (none) nor above 1 (all)
    recalled_bytes: float = 0.0  # per request and step

    @property
    def corrected(self) -> float:
        """Share of the rows that select a second time."""
        return 1.0 if self.tau > 1 else 0.0 if self.tau <= -1 else self.flagged_share

    @property
    def is_over(self) -> bool:
        """Whether pages are scored and selected at all."""
        return self.budget is not None and self.context > self.budget


@dataclass(frozen=True)
class Work:
    """What a step does on one rank. `per_unit` of `fit` are its prices."""

    layers: int
    layer_requests: int
    weight_bytes: float
    flops: float
    attention_bytes: float
    scoring_bytes: float  # of summaries and codes, on a GPU a corrected row's twice
    selections: float  # in how many layers windows are selected; a second time for corrected rows
    exposed_bytes: float  # recalled while the step waits
    hidden_bytes: float  # recalled beside it


def work_of(model: Model, setting: Setting, device: str = "cuda", tp: int = 1) -> Work:
    """Count what a step reads, from the geometry of a rank's KV cache."""
    s, g = setting, model.geometry(setting.page_size, setting.key_bits, device, tp)
    attended = s.context if s.budget is None else min(s.context, s.budget)
    rounds = 1 + s.corrected if s.is_over else 0
    scored = min(rounds, 1) if device == "cpu" else rounds  # a CPU corrects with the scores of the next step
    num_pages = -(-s.context // s.page_size)
    recalled = s.batch * s.recalled_bytes / tp if s.is_over else 0.0
    return Work(
        layers=g.num_layers,
        layer_requests=g.num_layers * s.batch,
        weight_bytes=model.read_params * model.weight_bits / 8 / tp,
        flops=2 * model.read_params * s.batch / tp,
        attention_bytes=s.batch * attended * g.token_bytes,
        scoring_bytes=scored * s.batch * num_pages * INDEXES["codes" if g.key_bits else "min-max"].page_bytes(g),
        selections=rounds * g.num_layers,
        exposed_bytes=recalled * s.corrected,
        hidden_bytes=recalled * (1 - s.corrected),
    )


def kernels_of(machine: Machine, setting: Setting) -> Kernels:
    return machine.plain if setting.budget is None else machine.freekv


def weights_seconds(machine: Machine, work: Work) -> float:
    """Reading the weights, or multiplying by them where the batch is large."""
    return max(work.weight_bytes / (machine.memory_gbs * 1e9), work.flops / machine.flops)


def step_seconds(machine: Machine, model: Model, setting: Setting, tp: int = 1, is_worst: bool = False) -> float:
    """Predict one decode step.

    Parameters
    ----------
    tp : int
        Ranks that share the model.
    is_worst : bool
        As if every recall were waited for.
    """
    kernels = kernels_of(machine, setting)
    work = work_of(model, setting, machine.device, tp)
    busy = kernels.step_s + work.layers * kernels.layer_s + work.layer_requests * kernels.request_s
    busy += work.layers * 2 * machine.all_reduce_s if tp > 1 else 0.0
    busy += weights_seconds(machine, work)
    busy += work.attention_bytes / (kernels.attention_gbs * 1e9)
    busy += work.scoring_bytes / (kernels.scoring_gbs * 1e9) + work.selections * kernels.select_s
    link = machine.recall_gbs * 1e9
    hidden, exposed = work.hidden_bytes / link, work.exposed_bytes / link
    if is_worst or not machine.overlaps:
        return busy + hidden + exposed
    return max(busy, hidden) + exposed + hidden / work.layers
