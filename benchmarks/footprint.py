"""The KV footprint of sessions: tokens held times steps held, over the device and over the host.

A session with a prompt of P tokens decodes G - 1 of its G tokens: the first comes with the prompt. In decode step t it
has P + t tokens, so

    full   = sum over t = 1 .. G - 1 of (P + t)                what full attention holds on the device
    device = sum over the same steps of what the device must hold / full
    host   = sum over the same steps of what the host store holds / full

Full attention has 1 and 0. What retrieval must hold on the device, the bound of its windows and the page index, is
counted by the engine (`sglang_freekv.memory.footprint.DeviceFootprint`). The host store holds every token once, so what
it holds is also what full attention would in the same steps, among them the one that overlapped scheduling computes
past the end of a request. Requests that run together are put together by summing.

Source: "Cache Me If You Can", arXiv 2506.17121: entries of the KV cache that are not evicted, summed over the steps,
relative to full attention. Differs from it: the paper knows one tier, and counts the steps of prefill, too. They are
left out here, as every method reads a prompt in the same way. And what pages are chosen by counts as KV of that size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import NamedTuple

COUNTERS = ("device_token_steps", "host_token_steps")  # of the engine


class Footprint(NamedTuple):
    """What is held, relative to full attention in the same steps."""

    device: float
    host: float

    def records(self) -> dict[str, float]:
        """By metric; of the unit "ratio"."""
        return {"device_footprint": self.device, "host_footprint": self.host}


FULL_ATTENTION = Footprint(1.0, 0.0)
TITLE = "KV footprint device / host"  # of a table's column


def cell(held: Sequence[Footprint]) -> str:
    """The mean over workloads, for a table: device / host; empty where none is known."""
    return " / ".join(f"{mean(part):.2f}" for part in zip(*held, strict=True))


def footprint(counters: Mapping[str, int]) -> Footprint | None:
    """The footprint of what was decoded while the counters advanced; None where nothing was, or they are not there.

    Parameters
    ----------
    counters : mapping
        By how much each of `COUNTERS` has advanced.
    """
    device, full = (counters.get(name) for name in COUNTERS)
    return Footprint(device / full, host=1.0) if device is not None and full else None
