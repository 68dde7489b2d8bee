"""Soak a real server for a while:  python -m tools.soak --minutes 30 [--out FILE] [-- flags of the server]

Mixed requests of all sizes with shared prefixes, aborts, disconnects, refusals, flushes, and bursts beyond the host
memory. It ends with a summary, or at the first thing that is wrong, with an error.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.records import RecordWriter
from tools.servers import serve
from tools.soak.process_memory import LIMIT_MIB_PER_HOUR
from tools.soak.references import make_references
from tools.soak.settings import BUDGETS, FLAGS, HASTE, MODEL, STRICT
from tools.soak.soak import Summary, soak


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__.partition(":")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("soak.log"), help="of the server (default: soak.log)")
    parser.add_argument("--out", type=Path, help="append the summary to this file of records")
    parser.add_argument("flags", nargs="*", help="more flags of the server, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        MODEL.write(Path(folder))
        references = make_references(Path(folder), BUDGETS[-1], arguments.seed)
        with serve(Path(folder), arguments.log, *FLAGS, *arguments.flags, env=STRICT | HASTE) as server:
            summary = soak(server, references, 60 * arguments.minutes, arguments.seed, _say)
    print(f"The soak is over, and nothing was wrong.\n{summary}")
    if arguments.out:
        write_records(arguments.out, summary, " ".join(arguments.flags))


def _say(line: str) -> None:
    print(line, flush=True)


def write_records(path: Path, summary: Summary, flags: str) -> None:
    """One record per number that counts."""
    writer = RecordWriter("soak", path, module="tools.soak")
    params = {"minutes": round(summary.seconds / 60, 1), "seed": summary.seed, "flags": flags}
    for metric, value, unit in (
        ("requests", summary.requests.total(), "requests"),
        ("finished", summary.ended["length"], "requests"),
        ("outputs_equal_to_reference", summary.compared, "requests"),
        ("refused", summary.ended["refused"], "requests"),
        ("ended_by_client", summary.ended["abort"] + summary.ended["hung_up"] + summary.ended["left"], "requests"),
        ("retractions", summary.retractions, "requests"),
        ("leaked_tokens", summary.leaked_tokens, "tokens"),
        ("absent_pages", summary.state["absent_pages"], "pages"),
        ("memory", summary.memory_mib, "MiB"),
        ("memory_slope", summary.memory_slope_mib_per_hour, f"MiB/hour, limit {LIMIT_MIB_PER_HOUR}"),
    ):
        writer.write(metric, value, unit, params)


if __name__ == "__main__":
    main()
