"""The servers of a matrix: a method, its sizes, and the budgets that requests ask it for.

Budgets are asked for per request, so one server answers for all budgets of a method, and its prefix cache for all of
them, too. What only flags can say (tau, page size, pooling, sink, recent, dense layers) takes a server each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.methods import Method
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry

_DEFAULTS = FreeKVConfig()


class Layout(NamedTuple):
    """Sizes of a retrieval method, in tokens; the engine's defaults."""

    page_size: int = _DEFAULTS.page_size
    pooling: str = ""  # the engine's
    sink: int = _DEFAULTS.sink_tokens
    recent: int = _DEFAULTS.recent_tokens
    dense_layers: str = ""  # like the flag: "0,1"
    key_bits: int = _DEFAULTS.key_bits


def read_geometry(model: Path) -> Geometry:
    """Shape of a model's KV, computed in float32."""
    config = json.loads((model / "config.json").read_text())
    return Geometry(
        num_layers=config["num_hidden_layers"],
        num_qo_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        dtype=torch.float32,
    )


@dataclass(frozen=True)
class Setting:
    """A server: a method, its layout, and the budgets (tokens, ascending) that requests ask it for."""

    method: Method
    layout: Layout
    budgets: tuple[int | None, ...]

    @property
    def params(self) -> dict[str, Any]:
        """What tells it from other settings in results."""
        layout = {} if self.method.is_full else self.layout._asdict()
        return {"method": self.method.name, **layout}

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in self.params.values() if value != "").replace(",", "+")

    def flags(self, geometry: Geometry, concurrency: int) -> list[str]:
        """Flags of the server for its method and layout.

        The device holds two windows of the largest budget for each of `concurrency` requests, which is what the engine
        needs, and nothing more: what else is selected is recalled.
        """
        page_size, pooling, sink, recent, dense_layers, key_bits = self.layout
        flags = ["--page-size", page_size]
        if self.method.is_full:
            return [str(flag) for flag in flags]
        largest = self.budgets[-1]
        num_cached = geometry.num_layers - len([layer for layer in dense_layers.split(",") if layer])
        block_bytes = replace(geometry, page_size=page_size).block_bytes
        blocks = concurrency * 2 * (largest // page_size) * geometry.num_kv_heads + 1  # one more, for rounding
        flags += ["--kv-retrieval", "freekv", "--freekv-budget", largest]
        flags += ["--freekv-sink", sink, "--freekv-recent", recent]
        flags += ["--freekv-group-pooling", pooling] if pooling and "pooling" not in self.method.ignores else []
        flags += ["--freekv-key-bits", key_bits]
        flags += ["--freekv-dense-layers", dense_layers] if dense_layers else []
        flags += ["--freekv-device-blocks-memory", f"{blocks * num_cached * block_bytes / 2**30:.9f}"]
        return [str(flag) for flag in (*flags, *self.method.flags)]


def settings(methods: Sequence[Method], layouts: Iterable[Layout], budgets: Iterable[int]) -> list[Setting]:
    """Every method with every layout; full attention once.

    A field that changes nothing for a method is that of the first layout.

    Raises
    ------
    ValueError
        If a budget leaves nothing to select.
    """
    budgets, layouts = tuple(sorted(set(budgets))), list(layouts)
    for layout in layouts:
        least = layout.sink + layout.recent + layout.page_size
        wrong = [budget for budget in budgets if budget < least or budget % layout.page_size]
        if wrong:
            raise ValueError(
                f"budget {wrong[0]} with pages of {layout.page_size}, sink {layout.sink} and recent {layout.recent}: "
                f"give whole pages, at least {least} tokens, or a smaller sink and recent"
            )
    found: list[Setting] = []
    for method in methods:
        for layout in layouts:
            if method.is_full:
                found.append(Setting(method, layouts[0], (None,)))
            else:
                same = {field: getattr(layouts[0], field) for field in method.ignores}
                found.append(Setting(method, layout._replace(**same), budgets))
    return list(dict.fromkeys(found))
