"""Pictures of the throughput suite, a file each: plain SGLang and FreeKV over what the series vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator, StrMethodFormatter

from benchmarks.records import Record
from benchmarks.tables.table import latest
from benchmarks.throughput.setups import FREEKV, PLAIN
from benchmarks.throughput.workloads import SERIES

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """A metric over a parameter of a series."""

    name: str  # of the file
    workload: str
    metric: str
    over: str  # the parameter
    x: str
    y: str
    scale: float = 1.0


PICTURES = (
    Picture("throughput_context", "context", "decode_throughput", "context", "context (tokens)", "decoding (tokens/s)"),
    Picture(
        "throughput_concurrency",
        "concurrency",
        "decode_throughput",
        "concurrency",
        "requests at once",
        "decoding (tokens/s)",
    ),
    Picture("ttft_prefix", "prefix", "ttft_p50", "prefix", "shared prefix (tokens)", "time to first token (ms)"),
    Picture(
        "memory_per_request",
        "context",
        "device_bytes_per_request",
        "context",
        "context (tokens)",
        "device memory of a request (MiB)",
        scale=1 << 20,
    ),
)


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write the pictures that the records have points for, as PNG."""
    return [path for picture in PICTURES if (path := _draw(picture, records, folder)) is not None]


def _draw(picture: Picture, records: Sequence[Record], folder: Path) -> Path | None:
    where = {"phase": SERIES, "workload": picture.workload, "setup": FREEKV}
    found = [r for r in latest(records) if r.metric == picture.metric and where.items() <= r.params.items()]
    points = sorted({r.params[picture.over]: r for r in found}.items())
    if not points:
        return None
    x = [value for value, _ in points]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(4.2, 3.0), layout="constrained")
        axes.plot(x, [r.baseline_value / picture.scale for _, r in points], "o--", color="black", label=PLAIN)
        axes.plot(x, [r.value / picture.scale for _, r in points], "D-", color="#0072B2", label="FreeKV")
        axes.set(xlabel=picture.x, ylabel=picture.y, xscale="log", yscale="log")
        axes.set_xticks(x)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend()
        path = folder / f"{picture.name}.png"
        figure.savefig(path, dpi=130, metadata={"Software": None})
        plt.close(figure)
    return path
