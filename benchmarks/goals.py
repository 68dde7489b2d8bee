"""What was hoped for of a number, and whether it came true."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.tables.table import Table


@dataclass(frozen=True)
class Goal:
    """A number, and the bound that it should keep; without a bound it is shown only."""

    name: str
    value: float | None  # None where a measurement that it needs is missing
    at_least: float | None = None
    at_most: float | None = None

    @property
    def wanted(self) -> str:
        bounds = {"at least": self.at_least, "at most": self.at_most}
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        is_low = self.at_least is not None and self.value < self.at_least
        is_high = self.at_most is not None and self.value > self.at_most
        return "MISSED" if is_low or is_high else "met" if self.wanted else ""


def goals_table(goals: Iterable[Goal]) -> Table:
    lines = [["goal", "wanted", "got", ""]]
    lines += [[g.name, g.wanted, "" if g.value is None else f"{g.value:.2f}", g.verdict] for g in goals]
    return Table(lines)
