"""Marked tables of a markdown text.

    <!-- accuracy accuracy_budgets summary -->
    <!-- end -->

is filled with the table `summary` of the kind `accuracy`, made from benchmarks/results/accuracy_budgets.jsonl, and
`<!-- conditions -->` ... `<!-- end -->` with the conditions of all tables of the text, which the tables then cite.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.records import RESULTS, Record, read_records
from benchmarks.tables.table import Table

Render = Callable[[Sequence[Record], str], Table]
_TABLE = re.compile(r"(<!-- (\w+) (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_CONDITIONS = re.compile(r"(<!-- conditions -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, kinds: Mapping[str, Render], results: Path = RESULTS) -> str:
    """Rewrite every marked table.

    Parameters
    ----------
    kinds : mapping
        The first word of a marker -> what renders (records, TABLE).
    results : Path
        Folder of the records.

    Raises
    ------
    ValueError
        If a marker names another kind.
    """
    conditions: list[str] = []  # cited so far
    has_conditions = _CONDITIONS.search(text) is not None

    def rendered(match: re.Match) -> str:
        start, kind, file, name, end = match.groups()
        if kind not in kinds:
            raise ValueError(f"{start.strip()} names no kind of tables: there are {', '.join(kinds)}")
        path = results / f"{file}.jsonl"
        table = kinds[kind](read_records(path) if path.exists() else [], name)
        conditions.extend(condition for condition in table.conditions if condition not in conditions)
        cited = ", ".join(f"[{conditions.index(condition) + 1}]" for condition in table.conditions)
        citation = f"\nconditions {cited}\n" if has_conditions and cited else ""
        return f"{start}{table.markdown()}{citation}{end}"

    text = _TABLE.sub(rendered, text)
    listed = "".join(f"[{number}] {condition}\n\n" for number, condition in enumerate(conditions, start=1))
    folded = f"<details><summary>Conditions</summary>\n\n{listed}</details>\n"
    return _CONDITIONS.sub(lambda match: f"{match[1]}{folded}{match[2]}", text)
