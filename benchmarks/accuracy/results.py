"""What a matrix has measured: a line per batch of sessions, and the sums over the batches of a cell."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.accuracy import intervals
from benchmarks.accuracy.intervals import Interval
from benchmarks.footprint import Footprint, footprint
from benchmarks.records import Record, RecordWriter

FULL = "full"
_BASELINE = "full attention"


@dataclass(frozen=True)
class Result:
    """A batch of sessions, played with one setting and budget."""

    cell: dict[str, Any]  # task, group, context, method, layout and budget: what the tables are about
    sessions: str  # digest of the prompts
    server: str  # digest of its flags and of the model
    scores: list[list[list[float] | None]]  # of each session and turn one value per reference; None: not scored
    outputs: list[list[list[int]]]  # tokens of each session and turn
    generated: int  # tokens
    decoded: int  # of them, in `seconds`
    seconds: float  # of decoding
    counters: dict[str, int] | None  # advanced by the batch

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for results that need not be measured again."""
        return make_key(self.cell, self.sessions, self.server)


def make_key(cell: dict[str, Any], sessions: str, server: str) -> tuple[str, ...]:
    return json.dumps(cell, sort_keys=True), sessions, server


def append(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read(path: Path) -> dict[tuple[str, ...], Result]:
    """Results by key. The last line may be half of one, where the run was ended: it is cut off.

    Raises
    ------
    ValueError
        If another line is no result.
    """
    names = {field.name for field in fields(Result)}
    text = path.read_text() if path.exists() else ""
    whole, _, rest = text.rpartition("\n")
    if rest:
        path.write_text(whole + "\n" * bool(whole))
    found: dict[tuple[str, ...], Result] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        values = json.loads(line)
        if set(values) != names:
            raise ValueError(f"{path}:{number}: not a result of this version; remove the file, or choose another --out")
        result = Result(**values)
        found[result.key] = result
    return found


@dataclass(frozen=True)
class Cell:
    """All sessions of a task and context with one setting and budget."""

    params: dict[str, Any]  # `Result.cell`, and the number of sessions
    score: Interval
    full: float | None  # full attention's score on the same sessions
    share: Interval | None  # of that; None where it is 0 or missing
    turns: list[Interval]  # score by turn, of the turns that are scored; empty where sessions have one
    tokens_per_second: float | None  # of decoding
    recalled_per_token: float | None  # bytes
    flagged_share: float | None  # of (request, KV head, layer) rows over the budget
    hit_share: float | None  # of selected (page, KV head) pairs
    footprint: Footprint | None  # of the KV; full attention's is not counted
    absent_pages: int


def summarize(results: Iterable[Result], seed: int = 0) -> list[Cell]:
    """Put the batches of each cell together, and compare them with full attention on the same sessions."""
    batches: dict[str, list[Result]] = {}
    for result in results:
        batches.setdefault(json.dumps(result.cell, sort_keys=True), []).append(result)
    full = {
        (cell[0].cell["task"], cell[0].cell["context"], batch.sessions): batch
        for cell in batches.values()
        if cell[0].cell["method"] == FULL
        for batch in cell
    }
    cells = []
    for cell in batches.values():
        baseline = [full.get((batch.cell["task"], batch.cell["context"], batch.sessions)) for batch in cell]
        cells.append(_cell(cell, None if None in baseline else baseline, seed))
    return cells


def _cell(batches: list[Result], baseline: list[Result] | None, seed: int) -> Cell:
    sessions = [session for batch in batches for session in batch.scores]
    counters = [batch.counters for batch in batches if batch.counters is not None]
    total = {name: sum(counts[name] for counts in counters) for name in (counters[0] if counters else ())}
    generated, decoded = (sum(getattr(batch, name) for batch in batches) for name in ("generated", "decoded"))
    scored = [number for number, turn in enumerate(sessions[0]) if turn is not None]
    whole = baseline and _flat([session for batch in baseline for session in batch.scores])
    return Cell(
        params={**batches[0].cell, "sessions": len(sessions)},
        score=intervals.score(_flat(sessions), seed),
        full=whole and intervals.score(whole, seed).value,
        share=whole and intervals.share(_flat(sessions), whole, seed),
        turns=[intervals.score([s[number] for s in sessions], seed) for number in scored] if len(scored) > 1 else [],
        tokens_per_second=_ratio(decoded, sum(batch.seconds for batch in batches)),
        recalled_per_token=_ratio(total.get("recalled_bytes"), generated),
        flagged_share=_ratio(total.get("flagged_rows"), total.get("rows")),
        hit_share=_ratio(total.get("hits"), total.get("hits", 0) + total.get("misses", 0)),
        footprint=footprint(total),
        absent_pages=total.get("absent_pages", 0),
    )


def _flat(sessions: list[list[list[float] | None]]) -> list[list[float]]:
    """References of a session, over its turns."""
    return [[value for turn in session for value in turn or ()] for session in sessions]


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def write_records(cells: Iterable[Cell], writer: RecordWriter) -> list[Record]:
    """One record per number; an interval is a record of its upper end, compared with its lower end."""
    cells, records = list(cells), []

    def write(name: str, *values: Any, **compared: Any) -> None:
        records.append(writer.write(name, *values, **compared))

    speed = {(c.params["task"], c.params["context"]): c.tokens_per_second for c in cells if c.params["method"] == FULL}
    for cell in cells:
        is_full, params = cell.params["method"] == FULL, cell.params
        compared = {} if is_full or cell.full is None else {"baseline": _BASELINE, "baseline_value": cell.full}
        write("score", cell.score.value, "of 1", params, **compared)
        ends = {"score_high": cell.score, "share_high": None if is_full else cell.share}
        for name, interval in ends.items():
            if interval is not None:
                write(name, interval.high, "of 1", params, baseline="low", baseline_value=interval.low)
        plain = None if is_full else speed.get((params["task"], params["context"]))
        if cell.tokens_per_second is not None:
            compared = {"baseline": _BASELINE, "baseline_value": plain} if plain else {}
            write("decode_throughput", cell.tokens_per_second, "tokens/s", params, **compared)
        for name, unit in (("recalled_per_token", "bytes"), ("flagged_share", "ratio"), ("hit_share", "ratio")):
            if (value := getattr(cell, name)) is not None:
                write(name, value, unit, params)
        for name, value in (cell.footprint.records() if cell.footprint else {}).items():
            write(name, value, "ratio", params)
        for number, turn in enumerate(cell.turns, start=1):
            write("turn_score", turn.value, "of 1", {**params, "turn": number})
    return records
