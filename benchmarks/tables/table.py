"""A table, the numbers in its cells, and which of several equal records it shows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.records import Record

Lines = list[list[str]]


@dataclass(frozen=True)
class Table:
    """Lines of cells, the header first, and the conditions under which their numbers came about."""

    lines: Lines
    conditions: tuple[str, ...] = ()

    def markdown(self) -> str:
        if len(self.lines) <= 1:
            return "No records yet.\n"
        header, *body = self.lines
        lines = [header, ["---"] * len(header), *body]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def text(self) -> str:
        """For a terminal: columns side by side, no marks."""
        columns = zip(*self.lines, strict=True)
        widths = [max(map(len, column)) for column in columns]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in self.lines)
        return "".join(f"{line}\n" for line in lines)

    def __str__(self) -> str:
        """The markdown, and below it the conditions."""
        return "\n".join([self.markdown(), *(f"{condition}\n" for condition in self.conditions)])


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, thousands divided; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def latest(records: Iterable[Record], without: Collection[str] = ()) -> list[Record]:
    """Of records with the same metric and parameters the last, in the place of the first.

    Parameters
    ----------
    without : names
        Parameters that do not tell records apart.
    """
    return list({(record.metric, _identity(record, without)): record for record in records}.values())


def _identity(record: Record, without: Collection[str]) -> str:
    return json.dumps({name: value for name, value in record.params.items() if name not in without}, sort_keys=True)


class Row(NamedTuple):
    """What was run, and the records of it."""

    params: dict[str, Any]
    records: list[Record]

    @property
    def numbers(self) -> dict[str, Record]:
        """By metric."""
        return {record.metric: record for record in self.records}


def rows_of(records: Iterable[Record], without: Collection[str] = ()) -> list[Row]:
    """The latest records, together where their parameters are equal but for those named in `without`."""
    rows: dict[str, Row] = {}
    for record in latest(records):
        params = {name: value for name, value in record.params.items() if name not in without}
        rows.setdefault(_identity(record, without), Row(params, [])).records.append(record)
    return list(rows.values())


def conditions_of(records: Iterable[Record]) -> tuple[str, ...]:
    """Machine, versions, commit and command of records, each combination once."""
    return tuple(dict.fromkeys(_condition(record) for record in records))


def _condition(record: Record) -> str:
    e = record.environment
    machine = f"{e['gpu'] or e['cpu']}, {e['cores']} cores, torch {e['torch']}, sglang {e['sglang']}"
    return f"{machine}; commit {record.commit}; `{record.command}`"
