"""The time of a decode step on a card, kernel by kernel: launches, instructions, bytes and link.

    front  = launches + scan + correction + exposed recalls / link           of a layer: attention waits for it
    beside = launches + scan, where a cosine corrects + hidden recalls / link         of a layer, on other streams
    step   = max(step + layers * (layer + front) + weights, window and what is scanned beside / memory,
                 recalls / link) + what of the last layer's `beside` is longer than the logits

`launches` has the counts and what is assumed beside them. `step_time` prices the same work by a few rates that measured
steps can calibrate; nothing here is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.cost_model.cards import Card
from benchmarks.cost_model.launches import (
    COSINE,
    GATE,
    LAYER_S,
    STEP_S,
    fixed_seconds,
    launch_seconds,
    pages_per_second,
    rows_seconds,
)
from benchmarks.cost_model.model import Model
from benchmarks.cost_model.step_time import Setting, geometry_of, logits_seconds, scoring_bytes, work_of
from benchmarks.cost_model.traffic import Traffic
from freekv_kernels import GROUP_PAGES
from sglang_freekv.memory.geometry import num_pages_of
from sglang_freekv.memory.windows import WindowSizes


@dataclass(frozen=True)
class GPUStep:
    """Seconds, of all layers where a layer has them."""

    base: float  # weights, attention and what any step launches
    launches: float = 0.0  # in front of attention
    scan: float = 0.0  # in front of attention
    correction: float = 0.0
    exposed_link: float = 0.0
    beside: float = 0.0  # on other streams
    beside_memory: float = 0.0  # that scans beside take from everybody's reads
    link: float = 0.0  # all recalls
    tail: float = 0.0  # after the logits

    @property
    def front(self) -> float:
        """What attention waits for."""
        return self.launches + self.scan + self.correction + self.exposed_link

    @property
    def seconds(self) -> float:
        return max(self.base + self.front + self.beside_memory, self.link) + self.tail


def under(traffic: Traffic, setting: Setting, model: Model) -> Setting:
    """A setting with what the traffic makes it correct and recall, with the device blocks that its windows ask for."""
    s, g = setting, geometry_of(model, setting)
    recalled = traffic.recalled_bytes(s.resident, s.selected * g.token_bytes)
    shares = {"flagged_share": traffic.flagged_share, "exposed_share": traffic.exposed_share}
    return replace(s, recalled_bytes=recalled, scored_share=traffic.scored_share, **shares)


def window_only(setting: Setting) -> Setting:
    """The same requests, had they no more tokens than their budget."""
    return Setting(min(setting.context, setting.config.budget_tokens), setting.batch)


def full_attention(setting: Setting) -> Setting:
    return Setting(setting.context, setting.batch)


def gpu_step(card: Card, model: Model, setting: Setting) -> GPUStep:
    """Predict one decode step; without a budget, or within it, one that retrieves nothing."""
    work = work_of(model, setting)
    weights = max(work.weight_bytes / card.memory_rate, work.flops / (card.tflops * 1e12))
    base = STEP_S + work.layers * LAYER_S + weights + work.attention_bytes / card.memory_rate
    if not setting.is_over:
        return GPUStep(base)
    is_gate, layers = setting.config.min_cosine is None, work.layers
    ops = GATE if is_gate else COSINE
    if setting.config.candidates:
        ops = ops.with_candidates()
    rows = setting.batch * model.kv_heads
    corrected = rows * (setting.scored if is_gate else setting.corrected)
    hidden = work.hidden_bytes / layers / card.link_rate
    scan_beside = 0.0 if is_gate else scan_seconds(card, model, setting, rows)
    beside = launch_seconds((*ops.scan, *ops.fetch)) + scan_beside + hidden
    beside += 0.0 if is_gate else _correction_seconds(card, setting, rows)
    return GPUStep(
        base=base,
        launches=layers * fixed_seconds(ops),
        scan=layers * scan_seconds(card, model, setting, corrected),
        correction=layers * _correction_seconds(card, setting, corrected),
        exposed_link=work.exposed_bytes / card.link_rate,
        beside=layers * beside,
        beside_memory=layers * _scanned_bytes(model, setting, rows) / card.memory_rate if scan_beside else 0.0,
        link=(work.exposed_bytes + work.hidden_bytes) / card.link_rate,
        tail=max(0.0, beside - logits_seconds(model, card.memory_rate)),
    )


def scan_seconds(card: Card, model: Model, setting: Setting, rows: float) -> float:
    """Score the pages of some rows of a layer: bound by instructions or by memory."""
    instructions = rows * scored_pages(setting) / pages_per_second(card)
    return max(instructions, _scanned_bytes(model, setting, rows) / card.memory_rate)


def _scanned_bytes(model: Model, setting: Setting, rows: float) -> float:
    """Of one layer: the index, and per page an entry of the page table and a score for each query head."""
    g = geometry_of(model, setting)
    every_row = replace(setting, flagged_share=0.0, scored_share=1.0)
    once = scoring_bytes(g, every_row) / g.num_layers / g.num_kv_heads
    return rows * (once + scored_pages(setting) * (8 + 4 * g.group_size))


def _correction_seconds(card: Card, setting: Setting, rows: float) -> float:
    """Share, judge and select; before that list candidates among groups, where there is a first level."""
    num_pages, columns = num_pages_of(setting.context, setting.config.page_size), scored_pages(setting)
    listing = rows_seconds(card, rows, num_pages // GROUP_PAGES) if columns < num_pages else 0.0
    return listing + rows_seconds(card, rows, columns)


def scored_pages(setting: Setting) -> int:
    """Pages of a request that are scored by codes."""
    config, num_pages = setting.config, num_pages_of(setting.context, setting.config.page_size)
    listed = WindowSizes.of(config, config.page_size).num_listed(config.candidates, num_pages)
    return num_pages if listed is None else min(num_pages, listed)
