"""What a run says, in words: a sentence for each workload, and at the end what is better and what is worse."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from benchmarks.records import Record
from benchmarks.tables.table import Row, number, rows_of
from benchmarks.throughput.report import OF_ROUNDS, label
from benchmarks.throughput.workloads import MEMORY

_WIDTH = 118
_TIE = 0.02  # ratios this near to 1 are not called better or worse
_LEGEND = (
    f"Medians of plain SGLang and FreeKV, and their ratio. {OF_ROUNDS}: the servers took turns for several rounds, and "
    "the ratio is the median of the rounds' ratios, as what disturbs the machine meets both servers of a round; the "
    "quotient of the medians above it is another number."
)


def in_words(records: Sequence[Record]) -> str:
    """Sentences about every workload, none longer than a terminal is wide."""
    rows = rows_of(records)
    lines = [_LEGEND, "", *(f"- {label(row)}: {'; '.join(_said(row))}." for row in rows), "", *_verdict(rows)]
    return "\n".join(textwrap.fill(line, _WIDTH, subsequent_indent="  " * line.startswith("-")) for line in lines)


def _said(row: Row) -> Iterator[str]:
    n = row.numbers
    yield f"{speed(row):.2f} times plain SGLang's {'decoding' if _decodes(row) else 'throughput'}"
    if "ttft_p50" in n:
        yield f"first token after {n['ttft_p50'].ratio:.2f} times its time"
    if "peak_concurrency" in n and n["peak_concurrency"].ratio != 1:
        yield f"{n['peak_concurrency'].value:.0f} requests at once, not {n['peak_concurrency'].baseline_value:.0f}"
    if "device_bytes" in n:
        yield f"{n['device_bytes'].ratio:.2f} times its device memory"
    if "recalled_per_token" in n:
        kib = n["recalled_per_token"].value / 1024
        yield f"{number(kib)} KiB recalled per token" if kib else "nothing recalled, the device holds what is selected"
    if "equal_outputs" in n:
        yield f"{n['equal_outputs'].value:.0%} of the answers that the budget covers equal plain SGLang's"


def speed(row: Row) -> float:
    """Ratio to plain SGLang of what a workload is about: decoding where all its requests decode together."""
    return row.numbers["decode_throughput" if _decodes(row) else "output_throughput"].ratio


def _decodes(row: Row) -> bool:
    decoding = row.numbers.get("decode_throughput")
    return decoding is not None and decoding.ratio is not None


def _verdict(rows: Sequence[Row]) -> Iterator[str]:
    faster = [label(row) for row in rows if speed(row) > 1 + _TIE]
    slower = [label(row) for row in rows if speed(row) < 1 - _TIE]
    yield f"FreeKV is faster in: {'; '.join(faster) or 'none'}."
    yield f"FreeKV is slower in: {'; '.join(slower) or 'none'}."
    smaller = [row.numbers["device_bytes"].ratio for row in rows if _saves(row)]
    if smaller:
        yield f"It needs {min(smaller):.2f} to {max(smaller):.2f} times plain SGLang's device memory."
    if not any(record.environment.get("gpu") for row in rows for record in row.records):
        yield "All of it is about this CPU path, and a model that is tiny unless you gave one; nothing about a GPU."


def _saves(row: Row) -> bool:
    """Whether the device bytes tell something: in `memory` they are made equal."""
    return row.params["phase"] != MEMORY and "device_bytes" in row.numbers
