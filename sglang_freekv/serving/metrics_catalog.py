"""Every metric of FreeKV's: name, unit, meaning, and what an operator does about it. Nothing else lists them."""

from __future__ import annotations

from typing import Literal, NamedTuple

PREFIX = "sglang:freekv_"


class Metric(NamedTuple):
    """One metric of a scheduler; a counter counts since start-up."""

    kind: Literal["gauge", "counter"]
    unit: str
    meaning: str
    advice: str  # what its value asks for

    @property
    def help(self) -> str:
        """The text under /metrics."""
        return f"{self.meaning} ({self.unit})"


METRICS = {
    "host_pages_used": Metric(
        "gauge",
        "pages",
        "Pages of the host store held by requests and by the prefix cache",
        "Near the total it is a full prefix cache, which is normal; see host_pages_evictable.",
    ),
    "host_pages_free": Metric(
        "gauge",
        "pages",
        "Free pages of the host store",
        "0 is normal as long as pages are evictable.",
    ),
    "host_pages_evictable": Metric(
        "gauge",
        "pages",
        "Of the used pages, those that only the prefix cache holds",
        "With free + evictable near 0 requests wait or are retracted: raise --freekv-host-memory, or send less.",
    ),
    "device_blocks_used": Metric(
        "gauge",
        "blocks",
        "Device blocks that hold the K and V of a (page, KV head), over all layers but the dense ones",
        "At the total it is a full cache, which is normal; then pages are recalled.",
    ),
    "device_blocks_total": Metric(
        "gauge",
        "blocks",
        "Device blocks that exist, over all layers but the dense ones",
        "Sized at start-up: --freekv-device-blocks-memory.",
    ),
    "max_running_requests": Metric(
        "gauge",
        "requests",
        "Requests that can run at the same time, --freekv-windows of device blocks each",
        "Where as many run and others wait: lower --freekv-max-budget, or raise --freekv-device-blocks-memory.",
    ),
    "steps": Metric(
        "counter",
        "steps",
        "Decode steps",
        "The divisor of what is counted per step.",
    ),
    "decoded_tokens": Metric(
        "counter",
        "tokens",
        "Tokens that decode steps have computed",
        "Divided by steps: the mean batch size.",
    ),
    "device_token_steps": Metric(
        "counter",
        "tokens",
        "Tokens that the device must hold for the requests of a decode step (windows, page index), summed over steps",
        "Divided by host_token_steps: the share of their KV that requests need on the device. It falls with their "
        "lengths; lower it with --freekv-budget or --freekv-key-bits.",
    ),
    "host_token_steps": Metric(
        "counter",
        "tokens",
        "Tokens of the requests of a decode step, all of them in the host store, summed over steps",
        "Divided by decoded_tokens: the mean length of a running request.",
    ),
    "selection_bytes": Metric(
        "counter",
        "bytes",
        "Bytes of the page index that decode steps read on the device to choose pages",
        "Divided by decoded_tokens: what choosing costs a request and step. Lower it with --freekv-score-interval, "
        "--freekv-candidates or --freekv-key-bits.",
    ),
    "recalled_bytes": Metric(
        "counter",
        "bytes",
        "Bytes copied from the host store to device blocks",
        "Its rate is the load on the link to the device. Near the link's speed decode waits for it: raise "
        "--freekv-device-blocks-memory or --freekv-gate, or lower --freekv-tau where that is set.",
    ),
    "hits": Metric(
        "counter",
        "pairs",
        "Selected (page, KV head) pairs that were resident",
        "hits / (hits + misses) is the hit rate; it falls with fewer device blocks per running request.",
    ),
    "misses": Metric(
        "counter",
        "pairs",
        "Selected (page, KV head) pairs that were not resident",
        "Each is a recall, beside the step that selected it.",
    ),
    "demand_misses": Metric(
        "counter",
        "pairs",
        "Pairs of a window that had lost their block before attention read them",
        "Each is a recall that attention waits for. More than a few per step: raise --freekv-device-blocks-memory.",
    ),
    "evictions": Metric(
        "counter",
        "blocks",
        "Blocks that were taken from a page for another",
        "0 while everything that is in use fits the device.",
    ),
    "looks": Metric(
        "counter",
        "blocks",
        "Blocks that were looked at for one that may be taken",
        "Divided by evictions: the looks that a claim takes, about 4. Many: nearly all blocks are in windows; raise "
        "--freekv-windows.",
    ),
    "rows": Metric(
        "counter",
        "rows",
        "(request, KV head, layer) rows of requests over their budget",
        "0 while every request is within its budget: then nothing is selected.",
    ),
    "pages_read": Metric(
        "counter",
        "pages",
        "Pages that these rows attended to",
        "Divided by rows: the mean size of a window. It is the budget, but where --freekv-mass lets heads read less.",
    ),
    "flagged_rows": Metric(
        "counter",
        "rows",
        "Rows corrected because their window would have lost too much of the attention, or their query had moved",
        "flagged_rows / rows is the share of corrections, a property of the model. It costs where misses are many, "
        "too; then raise --freekv-device-blocks-memory or --freekv-gate, or lower --freekv-tau where that is set.",
    ),
    "scored_rows": Metric(
        "counter",
        "rows",
        "Rows that a step selected the next window of, by scores of their pages",
        "scored_rows / rows is about what is left of scoring every row in every step. It falls with "
        "--freekv-score-interval, and where windows lack little.",
    ),
    "absent_pages": Metric(
        "counter",
        "entries",
        "Window entries without a block when attention ran: must stay 0",
        "Anything else is a bug, and the output of that step is wrong: restart, and report it.",
    ),
    "arena_filled_bytes": Metric(
        "counter",
        "bytes",
        "Bytes of prefix laid out in the prefill arena, all layers",
        "Its rate is what long or cached prefixes cost a prefill; fewer and larger chunks (--chunked-prefill-size) "
        "lay the same prefix out less often.",
    ),
    "audited_batches": Metric(
        "counter",
        "batches",
        "Batches after which --freekv-audit has checked blocks, summaries and windows",
        "Grows with the audit on, is 0 without it.",
    ),
    "audit_failures": Metric(
        "counter",
        "failures",
        "Batches after which the audit found an invariant broken: must stay 0",
        "At 1 the server has turned /health to 503 and ends within seconds: report its log.",
    ),
}


def published_name(name: str) -> str:
    """Name under /metrics: counters end in "_total" there."""
    return f"{PREFIX}{name}" + ("_total" if METRICS[name].kind == "counter" else "")


def markdown_table() -> str:
    """All metrics, for the documentation."""
    head = ["| metric | kind | unit | meaning | what to do |", "| --- | --- | --- | --- | --- |"]
    cells = [(f"`{published_name(name)}`", *metric) for name, metric in METRICS.items()]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in cells)])
