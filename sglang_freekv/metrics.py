"""Counters on SGLang's log line and on its Prometheus endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats

if TYPE_CHECKING:
    from sglang.srt.observability.metrics_collector import SchedulerStats

    from sglang_freekv.kv_memory import KVMemory

# name -> (kind, help); the names are published with the prefix "sglang:freekv_"
METRICS = {
    "host_pages_used": ("gauge", "Pages of the host store held by requests and by the prefix cache"),
    "host_pages_free": ("gauge", "Free pages of the host store"),
    "device_blocks_used": ("gauge", "Device blocks that hold a (page, KV head), over all layers"),
    "recalled_bytes": ("counter", "Bytes copied from the host store to device blocks"),
    "hits": ("counter", "Selected (page, KV head) pairs that were resident"),
    "misses": ("counter", "Selected (page, KV head) pairs that were not resident"),
    "demand_misses": ("counter", "Pairs of a window that had lost their block before attention read them"),
    "rows": ("counter", "(request, KV head, layer) rows of requests over their budget"),
    "flagged_rows": ("counter", "Rows corrected because their query had moved"),
    "absent_pages": ("counter", "Window entries without a block when attention ran: must stay 0"),
}


@dataclass
class FreeKVPoolStats(PoolStats):
    """SGLang's pool statistics, and ours; those are read only when they are shown."""

    memory: KVMemory | None = None

    @classmethod
    def extend(cls, stats: PoolStats, memory: KVMemory) -> FreeKVPoolStats:
        known = {name: getattr(stats, name) for name in PoolStats.__dataclass_fields__}
        return cls(**known, memory=memory)

    def freekv(self) -> dict[str, int]:
        """Name in METRICS -> value, counters since start-up."""
        page_size = self.memory.geometry.page_size
        values = {
            **self.memory.counters.as_dict(),
            "host_pages_used": self.memory.host.num_pages - 1 - self.full_available_size // page_size,
            "host_pages_free": self.full_available_size // page_size,
            "device_blocks_used": self.memory.blocks.num_resident,
        }
        return {name: values[name] for name in METRICS}

    def get_decode_usage_msg_parts(self) -> list[str]:
        f = self.freekv()
        return [
            *super().get_decode_usage_msg_parts(),
            f"freekv: {f['device_blocks_used']} blocks used, {f['recalled_bytes'] / 2**20:.1f} MiB recalled, "
            f"hit rate {_share(f['hits'], f['hits'] + f['misses'])}, flagged {_share(f['flagged_rows'], f['rows'])}, "
            f"{f['demand_misses']} demand misses, {f['absent_pages']} absent",
        ]

    def update_scheduler_stats(self, stats: SchedulerStats) -> None:
        super().update_scheduler_stats(stats)
        stats.freekv = self.freekv()


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "-"


@cache
def _collectors(label_names: tuple[str, ...]) -> dict:
    """Created on first use: prometheus_client reads its multiprocess directory at import."""
    from prometheus_client import Counter, Gauge

    return {
        name: Gauge(f"sglang:freekv_{name}", text, label_names, multiprocess_mode="mostrecent")
        if kind == "gauge"
        else Counter(f"sglang:freekv_{name}", text, label_names)
        for name, (kind, text) in METRICS.items()
    }


@cache
def _published() -> dict[str, int]:
    """Counter values already published, by name."""
    return dict.fromkeys(METRICS, 0)


def publish(freekv: dict[str, int], labels: dict[str, str]) -> None:
    """Bring the Prometheus metrics of this process up to date."""
    for name, collector in _collectors(tuple(labels)).items():
        if METRICS[name][0] == "gauge":
            collector.labels(**labels).set(freekv[name])
        else:
            collector.labels(**labels).inc(freekv[name] - _published()[name])
            _published()[name] = freekv[name]
