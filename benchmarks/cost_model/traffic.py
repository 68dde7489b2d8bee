"""What queries make a step correct and recall: measured with a small language model, read from its records."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from benchmarks.records import RESULTS, read_records

# Records of `benchmarks.real_model` -> context and budget in tokens of what is read of them.
SOURCES = {
    "rules_4k": (4096, 512),
    "rules_texts": (4096, 512),
    "rules_8k": (8064, 1024),
    "rules_2k": (8064, 2048),
    "real_model": (4096, 512),
}
DEFAULT_SOURCE = "rules_4k"


@dataclass(frozen=True)
class Traffic:
    """What decides how much is recalled, and is not predicted: measure it with a model and its requests.

    Of the default rule with device blocks for two windows 0.068 of the selected pages were recalled in a step;
    `recalled_bytes` expects 0.060.
    """

    turnover: float  # share of the selected pages that one step changes
    flagged_share: float  # of the rows, corrected
    exposed_share: float  # of the recalled bytes, that attention waits for


@cache
def measured_traffic(method: str = "freekv", source: str = DEFAULT_SOURCE) -> Traffic:
    """Of a method, by its name in records of real text.

    Raises
    ------
    ValueError
        If the records do not have it.
    """
    context, budget = SOURCES[source]
    wanted = {"method": method, "context": context, "budget": budget, "kind": "all"}
    records = [r for r in read_records(RESULTS / f"{source}.jsonl") if wanted.items() <= r.params.items()]
    found = {r.metric: r.value for r in records}
    if "exposed_bytes" not in found:
        raise ValueError(f"results/{source}.jsonl has no traffic of {method!r} at {context} tokens, budget {budget}")
    recalled = found["exposed_bytes"] + found["hidden_bytes"]
    return Traffic(found["turnover"], found["flagged"], found["exposed_bytes"] / recalled)
