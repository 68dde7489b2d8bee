"""What the engine counts; no logic."""

from __future__ import annotations

import torch

from freekv_kernels import Count


class Counters:
    """Totals since start-up, over all layers; what they mean is said at `freekv_kernels.Count`.

    Attributes
    ----------
    values : int64, ``[len(Count)]``, device
        Advanced by the ops.
    steps, decoded_tokens : int
        Of decode.
    device_token_steps, host_token_steps : int
        Tokens that the device and the host store hold for the requests of a decode step, summed over the steps: see
        `DeviceFootprint`. The host store holds every token, the new one included, as full attention does on the device.
    selection_bytes : int
        Of the page index that decode steps read to choose pages, see `SelectionReads`, as far as the host knows.
    arena_filled_bytes : int
        Prefix laid out for prefill, all layers.
    audited_batches, audit_failures : int
    """

    def __init__(self, record_bytes: int, device: str, scored_page_bytes: int = 0) -> None:
        self.values = torch.zeros(len(Count), dtype=torch.int64, device=device)
        self.steps = self.decoded_tokens = self.arena_filled_bytes = 0
        self.device_token_steps = self.host_token_steps = self.selection_bytes = 0
        self.audited_batches = self.audit_failures = 0
        self._record_bytes, self._scored_page_bytes = record_bytes, scored_page_bytes

    def __getitem__(self, count: Count) -> int:
        return int(self.values[count])

    def as_dict(self) -> dict[str, int]:
        totals = {count.name.lower(): total for count, total in zip(Count, self.values.tolist(), strict=True)}
        recalled_bytes = totals.pop("recalls") * self._record_bytes
        scored_bytes = totals.pop("scored_pages") * self._scored_page_bytes
        return {
            "steps": self.steps,
            "decoded_tokens": self.decoded_tokens,
            "device_token_steps": self.device_token_steps,
            "host_token_steps": self.host_token_steps,
            "selection_bytes": self.selection_bytes + scored_bytes,
            **totals,
            "recalled_bytes": recalled_bytes,
            "arena_filled_bytes": self.arena_filled_bytes,
            "audited_batches": self.audited_batches,
            "audit_failures": self.audit_failures,
        }
