"""The Grafana dashboard: what its panels show, and the JSON that Grafana imports."""

from __future__ import annotations

from typing import Any, NamedTuple

from sglang_freekv.serving.metrics_catalog import METRICS, published_name

_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 8  # of 24 grid units
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_INSTANCE = '{instance=~"$instance"}'


class Panel(NamedTuple):
    """One graph."""

    title: str
    unit: str  # Grafana's name of it
    queries: dict[str, str]  # legend -> PromQL; legends are followed by the instance
    maximum: float | None = None


def _value(name: str) -> str:
    """Select a gauge of ours, or a counter's total."""
    return published_name(name) + _INSTANCE


def _rate(name: str) -> str:
    return f"rate({_value(name)}[$__rate_interval])"


def _sglang(name: str) -> str:
    return f"sglang:{name}{_INSTANCE}"


def _sglang_rate(name: str) -> str:
    return f"rate({_sglang(name)}[$__rate_interval])"


def _quantile(share: float, name: str) -> str:
    buckets = _sglang_rate(f"{name}_bucket")
    return f"histogram_quantile({share}, sum by (instance, le) ({buckets}))"


_HOST_PAGES = f"({_value('host_pages_used')} + {_value('host_pages_free')})"
_HELD = f"({_value('host_pages_used')} - {_value('host_pages_evictable')})"

ROWS: dict[str, list[Panel]] = {
    "Integrity": [
        Panel("Absent pages: must stay 0", "short", {"absent": _value("absent_pages")}),
        Panel("Audit failures: must stay 0", "short", {"failures": _value("audit_failures")}),
        Panel("Batches audited per second", "ops", {"audited": _rate("audited_batches")}),
    ],
    "Requests": [
        Panel(
            "Requests",
            "short",
            {
                "running": _sglang("num_running_reqs"),
                "waiting": _sglang("num_queue_reqs"),
                "most that can run": _value("max_running_requests"),
            },
        ),
        Panel(
            "Tokens per second",
            "short",
            {"decoded": _rate("decoded_tokens"), "prompts": _sglang_rate("prompt_tokens_total")},
        ),
        Panel("Requests retracted since the report before", "short", {"retracted": _sglang("num_retracted_reqs")}),
        Panel(
            "Time to first token",
            "s",
            {
                "median": _quantile(0.5, "time_to_first_token_seconds"),
                "95 %": _quantile(0.95, "time_to_first_token_seconds"),
            },
        ),
        Panel(
            "Time between tokens",
            "s",
            {
                "median": _quantile(0.5, "inter_token_latency_seconds"),
                "95 %": _quantile(0.95, "inter_token_latency_seconds"),
            },
        ),
        Panel("Requests per decode step", "short", {"batch size": f"{_rate('decoded_tokens')} / {_rate('steps')}"}),
    ],
    "Host store: all KV of all requests and of the prefix cache": [
        Panel(
            "Host store in use",
            "percentunit",
            {
                "by running requests": f"{_HELD} / {_HOST_PAGES}",
                "with the prefix cache": f"{_value('host_pages_used')} / {_HOST_PAGES}",
            },
            maximum=1,
        ),
        Panel(
            "Pages of the host store",
            "short",
            {
                "held by requests": _HELD,
                "prefix cache only": _value("host_pages_evictable"),
                "free": _value("host_pages_free"),
            },
        ),
        Panel(
            "Prompt tokens found in the prefix cache", "percentunit", {"cached": _sglang("cache_hit_rate")}, maximum=1
        ),
    ],
    "Device blocks: the part of it that is on the device": [
        Panel(
            "Device blocks in use",
            "percentunit",
            {"used": f"{_value('device_blocks_used')} / {_value('device_blocks_total')}"},
            maximum=1,
        ),
        Panel(
            "Hit rate of selected pages",
            "percentunit",
            {"hits": f"{_rate('hits')} / ({_rate('hits')} + {_rate('misses')})"},
            maximum=1,
        ),
        Panel(
            "KV of running requests that must be on the device",
            "percentunit",
            {"windows and page index": f"{_rate('device_token_steps')} / {_rate('host_token_steps')}"},
        ),
        Panel("Recalled from CPU memory", "Bps", {"recalled": _rate("recalled_bytes")}),
        Panel("Recalled per decode step", "bytes", {"recalled": f"{_rate('recalled_bytes')} / {_rate('steps')}"}),
        Panel(
            "Misses per decode step",
            "short",
            {
                "beside the step": f"{_rate('misses')} / {_rate('steps')}",
                "attention waits": f"{_rate('demand_misses')} / {_rate('steps')}",
            },
        ),
        Panel(
            "Blocks looked at for each that is taken", "short", {"looks": f"{_rate('looks')} / {_rate('evictions')}"}
        ),
        Panel("Laid out in the prefill arena", "Bps", {"prefix": _rate("arena_filled_bytes")}),
    ],
    "Selection": [
        Panel(
            "Corrected share of rows",
            "percentunit",
            {"flagged": f"{_rate('flagged_rows')} / {_rate('rows')}"},
            maximum=1,
        ),
        Panel(
            "Rows over their budget per decode step",
            "short",
            {
                "rows": f"{_rate('rows')} / {_rate('steps')}",
                "scored": f"{_rate('scored_rows')} / {_rate('steps')}",
                "corrected": f"{_rate('flagged_rows')} / {_rate('steps')}",
            },
        ),
        Panel(
            "Read to choose pages, per token",
            "bytes",
            {"page index": f"{_rate('selection_bytes')} / {_rate('decoded_tokens')}"},
        ),
        Panel("Pages that a row attends to", "short", {"pages": f"{_rate('pages_read')} / {_rate('rows')}"}),
    ],
}


def queries() -> list[str]:
    """The PromQL of all panels, in order."""
    return [query for panels in ROWS.values() for panel in panels for query in panel.queries.values()]


def build() -> dict[str, Any]:
    """The dashboard, as Grafana 9 and later import it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        grid = {"x": 0, "y": y, "w": _COLUMNS * _WIDTH, "h": 1}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": grid, "panels": []}
        )
        for index, panel in enumerate(row):
            grid = {
                "x": index % _COLUMNS * _WIDTH,
                "y": y + 1 + index // _COLUMNS * _HEIGHT,
                "w": _WIDTH,
                "h": _HEIGHT,
            }
            panels.append(_panel(len(panels) + 1, panel, grid))
        y += 1 + -(-len(row) // _COLUMNS) * _HEIGHT
    return {
        "uid": "sglang-freekv",
        "title": "SGLang with FreeKV",
        "description": "A window of each request's KV on the device, all of it in CPU memory.",
        "tags": ["sglang", "freekv"],
        "schemaVersion": 38,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _panel(number: int, panel: Panel, grid: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": _DATASOURCE,
            "expr": query,
            "legendFormat": f"{legend} {{{{instance}}}}",
        }
        for i, (legend, query) in enumerate(panel.queries.items())
    ]
    limits = {"min": 0} | ({} if panel.maximum is None else {"max": panel.maximum})
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": _description(panel),
        "datasource": _DATASOURCE,
        "gridPos": grid,
        "fieldConfig": {"defaults": {"unit": panel.unit, **limits}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _description(panel: Panel) -> str:
    """What the metrics of a panel mean and ask for."""
    text = " ".join(panel.queries.values())
    shown = [metric for name, metric in METRICS.items() if published_name(name) + "{" in text]
    return "\n\n".join(f"{metric.help}. {metric.advice}" for metric in shown)


def _variables() -> list[dict[str, Any]]:
    query = f"label_values({published_name('steps')}, instance)"
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "instance",
            "label": "Server",
            "type": "query",
            "datasource": _DATASOURCE,
            "definition": query,
            "query": {"query": query, "refId": "instance"},
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        },
    ]
