"""Resident memory of a server's processes over time, and whether it grows."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

MIB = 2**20
# Growth below both is not told from what allocators keep.
LIMIT_MIB_PER_HOUR = 100
NOISE_MIB = 32


@dataclass
class ProcessMemory:
    """Samples of the sum over all processes of a server."""

    seconds: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)

    @contextmanager
    def sampled(self, pid: int, period_s: float) -> Iterator[None]:
        """Sample the processes under `pid` until the block ends."""
        ended = threading.Event()
        thread = threading.Thread(target=self._sample, args=(psutil.Process(pid), period_s, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _sample(self, root: psutil.Process, period_s: float, ended: threading.Event) -> None:
        while not ended.wait(period_s):
            try:
                rss = sum(process.memory_info().rss for process in [root, *root.children(recursive=True)])
            except psutil.NoSuchProcess:  # one has just ended: the soak itself will see why
                continue
            self.seconds.append(time.monotonic())
            self.rss_mib.append(rss / MIB)

    def slope_mib_per_hour(self) -> float:
        """Growth over the second half of the samples, by linear regression; 0 where there are too few."""
        seconds, rss = self._second_half()
        return statistics.linear_regression(seconds, rss).slope * 3600 if len(seconds) > 2 else 0.0

    def is_stable(self) -> bool:
        """Whether the growth over the second half is within the limit, or within what is noise."""
        seconds, _ = self._second_half()
        hours = (seconds[-1] - seconds[0]) / 3600 if seconds else 0.0
        slope = self.slope_mib_per_hour()
        return slope <= LIMIT_MIB_PER_HOUR or slope * hours <= NOISE_MIB

    def _second_half(self) -> tuple[list[float], list[float]]:
        half = len(self.seconds) // 2
        return self.seconds[half:], self.rss_mib[half:]
