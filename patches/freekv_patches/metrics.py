"""Statistics: SGLang builds one PoolStats per report; ours adds counters that the log line and Prometheus show."""

from __future__ import annotations

from freekv_patches.patch import HookType, Patch


def extend_pool_stats(result, self):
    from sglang_freekv.serving.kv_pool import FreeKVPool

    pool = self.token_to_kv_pool_allocator.get_kvcache()
    if isinstance(pool, FreeKVPool):
        from sglang_freekv.serving.metrics import FreeKVPoolStats

        return FreeKVPoolStats.extend(result, pool.memory)


def publish_metrics(result, self, stats):
    if (freekv := getattr(stats, "freekv", None)) is not None:
        from sglang_freekv.serving.metrics import publish

        publish(freekv, self.labels)


PATCHES = (
    Patch(
        target="sglang.srt.managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver.get_pool_stats",
        kind=HookType.AFTER,
        hook=extend_pool_stats,
        signature="(self) -> 'PoolStats'",
        reason="the log line and the metrics are built from PoolStats alone",
        remove_when="SGLang collects statistics from its pools",
    ),
    Patch(
        target="sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats",
        kind=HookType.AFTER,
        hook=publish_metrics,
        signature="(self, stats: 'SchedulerStats') -> 'None'",
        reason="the collector publishes the metrics it knows",
        remove_when="--stat-loggers can be given on the command line",
    ),
)
