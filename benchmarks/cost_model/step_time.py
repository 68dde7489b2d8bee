"""The time of one decode step: what is read, at which rate, and what hides behind it.

    busy   = step + layers * (layer + requests * request) + max(weights / memory, operations / flops)
             + KV or window / attention rate + pages' codes / scoring rate + selections
    step   = max(busy, hidden recalls / link) + exposed recalls / link + tail
    tail   = what hidden recalls of the last layer / link are longer than the logits

Recalls for the next step run on a second stream beside the layers that follow, but scoring on that stream reads the
memory that everybody reads, so it counts as busy. What this step's attention waits for is exposed. The last layer's
recalls run beside the logits. On a CPU nothing hides.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cost_model.machine import Kernels, Machine
from benchmarks.cost_model.model import Model
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry, num_pages_of
from sglang_freekv.memory.selection_reads import SelectionReads


@dataclass(frozen=True)
class Setting:
    """A decode step: requests of equal length, and the traffic that retrieval meets."""

    context: int  # tokens of each request
    batch: int  # requests
    config: FreeKVConfig | None = None  # None: plain SGLang
    flagged_share: float = 0.0  # of the rows, corrected
    recalled_bytes: float = 0.0  # per request and step
    exposed_share: float = 0.0  # of these, that attention waits for
    scored_share: float = 1.0  # of the rows, whose pages a step scores

    @property
    def budget(self) -> int | None:
        """Tokens that a request attends to; None: plain SGLang, all."""
        return None if self.config is None else self.config.budget_tokens

    @property
    def selected(self) -> int:
        """Tokens of the pages that a window selects, beside its first and latest ones."""
        return self.budget - self.config.sink_tokens - self.config.recent_tokens

    @property
    def resident(self) -> float:
        """Share of a request's tokens that its own windows of device blocks hold."""
        return min(1.0, self.config.windows * self.budget / self.context)

    @property
    def corrected(self) -> float:
        """Share of the rows that select a second time."""
        return self._unless_fixed(self.flagged_share)

    @property
    def scored(self) -> float:
        """Share of the rows whose pages a step scores."""
        return self.scored_share if self.config.score_interval > 1 else 1.0

    @property
    def exposed(self) -> float:
        """Share of the recalled bytes that attention waits for."""
        return self._unless_fixed(self.exposed_share)

    def _unless_fixed(self, share: float) -> float:
        """All where tau corrects every row, nothing where it corrects none."""
        tau = self.config.min_cosine
        return share if tau is None or -1 < tau <= 1 else float(tau > 1)

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
    scoring_bytes: float  # of summaries and codes; where a cosine corrects, a GPU reads a corrected row's twice
    selections: float  # in how many layers windows are selected; a second time for corrected rows
    exposed_bytes: float  # recalled while the step waits
    hidden_bytes: float  # recalled beside it


def work_of(model: Model, setting: Setting, device: str = "cuda", tp: int = 1) -> Work:
    """Count what a step reads, from the geometry of a rank's KV cache."""
    s, g = setting, geometry_of(model, setting, device, tp)
    attended = s.context if s.budget is None else min(s.context, s.budget)
    rounds = 1 + s.corrected if s.is_over else 0
    recalled = s.batch * s.recalled_bytes / tp if s.is_over else 0.0
    exposed = recalled * s.exposed if s.is_over else 0.0
    return Work(
        layers=g.num_layers,
        layer_requests=g.num_layers * s.batch,
        weight_bytes=model.read_params * model.weight_bits / 8 / tp,
        flops=2 * model.read_params * s.batch / tp,
        attention_bytes=s.batch * attended * g.token_bytes,
        scoring_bytes=s.batch * scoring_bytes(g, s, device) if s.is_over else 0.0,
        selections=rounds * g.num_layers,
        exposed_bytes=exposed,
        hidden_bytes=recalled - exposed,
    )


def geometry_of(model: Model, setting: Setting, device: str = "cuda", tp: int = 1) -> Geometry:
    """The KV cache of a rank; plain SGLang's as if it had FreeKV's pages."""
    config = setting.config or FreeKVConfig()
    return model.geometry(config.page_size, config.key_bits, device, tp)


def scoring_bytes(geometry: Geometry, setting: Setting, device: str = "cuda") -> float:
    """What a step reads to choose the pages of one request over its budget: as the engine counts it.

    Correction by the gate reads the shares of the next window. By a cosine it scores the flagged rows' pages once more,
    but for a CPU, which scores once for both.
    """
    g, config = geometry, setting.config
    num_pages = num_pages_of(setting.context, g.page_size)
    budget = config.budget_tokens // g.page_size
    once = SelectionReads(g, config, g.num_layers, num_pages).bytes([num_pages], [[budget] * g.num_kv_heads])
    scores_again = config.min_cosine is not None and device != "cpu"
    return once * (setting.scored + setting.corrected * scores_again)


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
    logits = logits_seconds(model, machine.memory_gbs * 1e9, tp)
    return max(busy, hidden) + exposed + max(0.0, hidden / work.layers - logits)


def logits_seconds(model: Model, memory_rate: float, tp: int = 1) -> float:
    """Reading what multiplies the last hidden states."""
    return model.logits_params * model.weight_bits / 8 / tp / memory_rate
