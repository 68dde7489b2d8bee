"""What queries make a step correct and recall: measured with a small language model, read from its records."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from benchmarks.cost_model.step_time import Setting
from benchmarks.records import RESULTS, read_records
from sglang_freekv.config import FreeKVConfig

# Records of `benchmarks.real_model` -> context and budget in tokens of what is read of them. "long": of 256 steps; the
# others have 48, which start with empty device blocks. "intervals": with rows scored after up to 8 steps.
SOURCES = {
    "rules_8k_long": (7872, 512),
    "rules_2k_long": (7872, 2048),
    "rules_long": (4096, 512),
    "rules_4k": (4096, 512),
    "rules_texts": (4096, 512),
    "rules_8k": (8064, 1024),
    "rules_2k": (8064, 2048),
    "intervals_8k_long": (7872, 512),
    "intervals_2k_long": (7872, 2048),
    "real_model": (4096, 512),
}
# Long, and its budget is the share of the context that 2,048 tokens are of 32K.
DEFAULT_SOURCE = "rules_8k_long"
# The model of the records, SmolLM2-135M in float32: KV of a token in 30 layers of 3 heads.
_TOKEN_BYTES = 30 * 3 * 2 * 64 * 4
_CONFIG = FreeKVConfig()  # of the records, but for the budget


@dataclass(frozen=True)
class Traffic:
    """What decides how much is recalled, and is not predicted: measure it with a model and its requests."""

    turnover: float  # share of the selected pages that one step changes
    flagged_share: float  # of the rows, corrected
    exposed_share: float  # of the recalled bytes, that attention waits for
    # Recalls, over those of pages that are as seldom resident as any page of the request: a window returns to pages.
    missed_share: float = 1.0
    scored_share: float = 1.0  # of the rows, whose pages a step scores

    def recalled_bytes(self, resident: float, selected_bytes: float) -> float:
        """Of a step, where a share of a request's tokens is resident and its windows select so many bytes."""
        return self.turnover * self.missed_share * (1 - resident) * selected_bytes


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
    found = {r.metric: r.value for r in records if r.params.get("windows", _CONFIG.windows) == _CONFIG.windows}
    if "exposed_bytes" not in found:
        raise ValueError(f"results/{source}.jsonl has no traffic of {method!r} at {context} tokens, budget {budget}")
    recalled = found["exposed_bytes"] + found["hidden_bytes"]
    traffic = Traffic(found["turnover"], found["flagged"], found["exposed_bytes"] / recalled)
    traffic = replace(traffic, scored_share=found.get("scored", 1.0))  # most have every row scored, and do not say so
    own = Setting(context, 1, replace(_CONFIG, budget_tokens=budget))
    expected = traffic.recalled_bytes(own.resident, own.selected * _TOKEN_BYTES)
    return replace(traffic, missed_share=recalled / expected)
