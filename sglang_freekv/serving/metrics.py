"""Counters on SGLang's log line and on its Prometheus endpoint; what they mean is said in `metrics_catalog`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats

from sglang_freekv.memory.units import in_words
from sglang_freekv.serving.metrics_catalog import METRICS, PREFIX

if TYPE_CHECKING:
    from sglang.srt.observability.metrics_collector import SchedulerStats

    from sglang_freekv.memory.kv_memory import KVMemory


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
        memory, page_size = self.memory, self.memory.geometry.page_size
        num_free = self.full_available_size // page_size
        values = {
            **memory.counters.as_dict(),
            "host_pages_used": memory.host.num_host_pages - 1 - num_free,
            "host_pages_free": num_free,
            "host_pages_evictable": self.full_evictable_size // page_size,
            "device_blocks_used": memory.blocks.num_resident,
            "device_blocks_total": memory.blocks.capacity,
            "max_running_requests": memory.max_requests,
        }
        return {name: values[name] for name in METRICS}

    def get_decode_usage_msg_parts(self) -> list[str]:
        f = self.freekv()
        return [
            *super().get_decode_usage_msg_parts(),
            f"freekv: {f['device_blocks_used']} blocks used, {in_words(f['recalled_bytes'])} recalled, "
            f"hit rate {_share(f['hits'], f['hits'] + f['misses'])}, flagged {_share(f['flagged_rows'], f['rows'])}, "
            f"{f['demand_misses']} demand misses, {f['absent_pages']} absent",
        ]

    def update_scheduler_stats(self, stats: SchedulerStats) -> None:
        super().update_scheduler_stats(stats)
        stats.freekv = self.freekv()


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "-"


class Publisher:
    """The Prometheus metrics of this process. Made on first use: prometheus_client reads its directory at import.

    Parameters
    ----------
    label_names : tuple of str
        SGLang's.
    """

    def __init__(self, label_names: tuple[str, ...]) -> None:
        from prometheus_client import Counter, Gauge

        self._collectors = {
            name: Gauge(f"{PREFIX}{name}", metric.help, label_names, multiprocess_mode="mostrecent")
            if metric.kind == "gauge"
            else Counter(f"{PREFIX}{name}", metric.help, label_names)
            for name, metric in METRICS.items()
        }
        self._published = dict.fromkeys(METRICS, 0)
        self.labels: dict[str, str] = {}  # of the last report

    def publish(self, values: dict[str, int], labels: dict[str, str]) -> None:
        """Bring the metrics up to date: name in METRICS -> value, counters since start-up."""
        self.labels = labels
        for name, value in values.items():
            collector = self._collectors[name].labels(**labels)
            if METRICS[name].kind == "gauge":
                collector.set(value)
            else:
                collector.inc(value - self._published[name])
                self._published[name] = value


_publisher: Publisher | None = None  # SGLang has one collector in a process


def publish(values: dict[str, int], labels: dict[str, str]) -> None:
    """Bring the Prometheus metrics of this process up to date."""
    global _publisher
    _publisher = _publisher or Publisher(tuple(labels))
    _publisher.publish(values, labels)


def publish_last_words(values: dict[str, int]) -> None:
    """Publish some metrics under the labels of the last report, as no other follows."""
    if _publisher is not None:
        _publisher.publish(values, _publisher.labels)
