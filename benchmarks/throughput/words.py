"""What a run says, in words: a sentence for each workload, and at the end what is better and what is worse."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from benchmarks.records import Record
from benchmarks.tables.table import Row, number, rows_of
from benchmarks.throughput.report import OF_ROUNDS, label
from benchmarks.throughput.workloads import ABLATION, MEMORY

_WIDTH = 118
_TIE = 0.02  # ratios this near to 1 are not called better or worse
_LEGEND = (
    f"Medians of plain SGLang and FreeKV, and their ratio. {OF_ROUNDS}: the servers took turns for several rounds, and "
    "the ratio is the median of the rounds' ratios, as what disturbs the machine meets both servers of a round; the "
    "quotient of the medians above it is another number. Decoding: tokens/s while all requests decode. First, next: "
    "until a request's first token, and between its others. MiB: of the device. Recalled: KiB from CPU memory a token."
)
_ABOUT = {
    "short": "requests that the budget covers",
    "random": "prompts of all lengths",
    "prefix": "questions about one cached document",
    "turns": "conversations",
    "generation": "long answers",
    "burst": "more requests than fit at once",
    "context": "questions about one cached document, all at once",
    "concurrency": "questions about one cached document, so many at once",
    "documents": "a document for each request, more than the device blocks hold",
    "memory": "a document for each request, plain SGLang's cache with as many bytes as all of FreeKV's device memory",
}


def in_words(records: Sequence[Record]) -> str:
    """Sentences about every workload, none longer than a terminal is wide; the ablations' table speaks for itself."""
    rows = rows_of(record for record in records if record.params["phase"] != ABLATION)
    lines = [_LEGEND, "", *(f"- {label(row)}, {_said(row)}" for row in rows)]
    lines += ["", *_verdict(rows)] if rows else []
    return "\n".join(textwrap.fill(line, _WIDTH, subsequent_indent="  " * line.startswith("-")) for line in lines)


def _said(row: Row) -> str:
    n = row.numbers
    named = {"throughput": "output_throughput", "decoding": "decode_throughput"}
    named |= {"first token after": "ttft_p50", "device memory": "device_bytes"}
    found = {name: n[metric].ratio for name, metric in named.items() if metric in n}
    ratios = [f"{name} {_times(ratio)}" for name, ratio in found.items() if ratio is not None]
    said = [f"{', '.join(ratios)} times plain SGLang's"] if ratios else []
    if (finished := n.get("finished")) and finished.value < 1:
        said.append(f"only {finished.value:.0%} of the requests finished")
    if (peak := n.get("peak_concurrency")) and peak.ratio != 1:
        said.append(f"{peak.value:.0f} requests at once, not {peak.baseline_value:.0f}")
    if recalled := n.get("recalled_per_token"):
        said.append(f"{number(recalled.value / 1024)} KiB recalled per token" if recalled.value else "nothing recalled")
    if equal := n.get("equal_outputs"):
        said.append(f"{equal.value:.0%} of the answers that the budget covers equal plain SGLang's")
    return f"{_ABOUT.get(row.params['workload'], 'your text')}: {'; '.join(said)}."


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.1g}"


def _verdict(rows: Sequence[Row]) -> Iterator[str]:
    for what, metric in (("Throughput", "output_throughput"), ("Decoding alone", "decode_throughput")):
        records = {label(row): row.numbers[metric] for row in rows if metric in row.numbers}
        ratios = {name: record.ratio for name, record in records.items() if record.ratio is not None}
        if ratios:
            better = [name for name, ratio in ratios.items() if ratio > 1 + _TIE]
            worse = [name for name, ratio in ratios.items() if ratio < 1 - _TIE]
            yield f"{what} is better in: {'; '.join(better) or 'none'}. Worse in: {'; '.join(worse) or 'none'}."
    smaller = [row.numbers["device_bytes"].ratio for row in rows if _saves(row)]
    if smaller:
        yield f"Device memory is {min(smaller):.2f} to {max(smaller):.2f} times plain SGLang's."
    if not any(record.environment.get("gpu") for row in rows for record in row.records):
        yield "All of it is about this CPU path, and a model that is tiny unless you gave one; nothing about a GPU."


def _saves(row: Row) -> bool:
    """Whether the device bytes tell something: in `memory` they are made equal."""
    return row.params["phase"] != MEMORY and "device_bytes" in row.numbers
