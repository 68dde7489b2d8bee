"""What is done and how long the rest takes, on the terminal."""

from __future__ import annotations

import sys
import time

from benchmarks.real_model.job import Work

# Work of decoding a token, in prefilled tokens; only the share of the two in the rest depends on it.
_DECODED_TOKEN = 20
_EVERY_SECONDS = 5


class Progress:
    """Counts work against its total (tokens prefilled and decoded)."""

    def __init__(self, prefill: int, decode: int) -> None:
        self._total, self._done = prefill + decode * _DECODED_TOKEN, 0
        self._start = self._shown = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def add(self, work: Work) -> None:
        """Count it; shown every few seconds."""
        self._done += work.prefilled + work.decoded * _DECODED_TOKEN
        now = time.monotonic()
        if now - self._shown >= (_EVERY_SECONDS if self._is_terminal else 12 * _EVERY_SECONDS):
            self._shown = now
            left = (now - self._start) * (self._total / self._done - 1)
            text = f"{self._done / self._total:4.0%}, about {left / 60:.0f} min left"
            print(
                f"\r{text:<40}" if self._is_terminal else text, end="" if self._is_terminal else "\n", file=sys.stderr
            )

    def say(self, text: str) -> None:
        """A line that stays."""
        self._print(text, end="\n")

    def _print(self, text: str, end: str) -> None:
        print(f"\r{text:<60}" if self._is_terminal else text, end=end, file=sys.stderr, flush=True)
