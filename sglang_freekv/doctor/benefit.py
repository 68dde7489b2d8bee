"""What KV retrieval buys on a machine: requests that fit beside plain SGLang, and the command line for it."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from sglang_freekv.doctor.capacity import Comparison, compare, gains_above, told_lengths
from sglang_freekv.doctor.forecast import Forecast

_REQUEST_TOKENS = 32768
_STORE_FLAG = "--freekv-host-memory"


class Benefit(NamedTuple):
    """Sizes only."""

    plain_tokens: int  # that plain SGLang holds at the same time, all requests together
    tokens: int  # of the plan
    comparisons: list[Comparison]  # the one that was asked for among them
    asked: Comparison
    gains_above: int | None  # tokens of a request; None: nowhere up to the model's context

    @property
    def has_better_store(self) -> bool:
        """Whether another host store holds more requests of the length that was asked for."""
        return self.asked.best.num_requests > self.asked.planned


def benefit_of(found: Forecast, request_tokens: int | None) -> Benefit:
    """Compare with plain SGLang on the same GPUs, with the same share of them."""
    context_len = found.model.context_len
    length = min(request_tokens or _REQUEST_TOKENS, context_len)
    comparisons = [compare(found.rank, found.config, found.plan, told) for told in told_lengths(length, context_len)]
    return Benefit(
        plain_tokens=found.rank.plain_tokens,
        tokens=found.plan.num_tokens,
        comparisons=comparisons,
        asked=next(comparison for comparison in comparisons if comparison.length == length),
        gains_above=gains_above(found.rank, found.config, context_len),
    )


def describe(benefit: Benefit, context_len: int) -> list[str]:
    """Lines for the report."""
    asked, best = benefit.asked, benefit.asked.best
    lines = [
        f"plain SGLang would hold {benefit.plain_tokens:,} tokens, {asked.plain:,} requests of {asked.length:,}; "
        f"this {benefit.tokens:,}, and {asked.planned:,} such requests",
    ]
    if benefit.has_better_store:
        lines.append(
            f"with {_STORE_FLAG} {best.host_memory_gib:g}, which is what these requests need, {best.num_requests:,}: "
            f"the summaries of a larger host store take device memory"
        )
    if benefit.gains_above is None:
        lines.append(f"it holds no more requests than plain SGLang, up to the model's {context_len:,} tokens")
    else:
        lines.append(
            f"with a host store for them it holds more requests than plain SGLang above a context of "
            f"{benefit.gains_above:,} tokens"
        )
    lines.append(f"{'requests of':>16} {'plain':>8} {'these flags':>12} {'at most':>8}  with {_STORE_FLAG}")
    lines += [
        f"{c.length:>9,} tokens {c.plain:>8,} {c.planned:>12,} {c.best.num_requests:>8,}  {c.best.host_memory_gib:g}"
        for c in benefit.comparisons
    ]
    lines.append("counted from sizes; of speed and of answers it says nothing, and no GPU was asked")
    return lines


def command_line(flags: list[str], benefit: Benefit | None) -> str:
    """The server's command, with a host store for the requests that were asked for where that holds more of them."""
    words = ["python", "-m", "sglang.launch_server", *flags]
    if not any(flag.partition("=")[0] == "--kv-retrieval" for flag in flags):
        words += ["--kv-retrieval", "freekv"]
    if benefit is not None and benefit.has_better_store:
        words += [_STORE_FLAG, f"{benefit.asked.best.host_memory_gib:g}"]
    return shlex.join(words)
