"""SGLang's own load generator, `python -m sglang.bench_serving`, in a child process for each run.

The children are forked from a process that has imported it once, which takes longer than many runs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

_CLIENT = "sglang.benchmark.serving"  # what sglang.bench_serving imports
_CONTEXT = multiprocessing.get_context("forkserver")


def prepare() -> None:
    """Start importing; the first run waits for what is left of it."""
    _CONTEXT.set_forkserver_preload([_CLIENT])
    forkserver.ensure_running()


def bench_serving(flags: list[str], out: Path) -> dict:
    """Run bench_serving with these flags.

    Parameters
    ----------
    out : Path
        Gets its line of results; what it prints goes beside it, into a file that ends in ``.log``.

    Returns
    -------
    Its results with all details: throughputs per second, latencies in milliseconds; ``ttfts`` and ``itls`` in seconds,
    ``generated_texts`` and ``errors``, one per request and turn.

    Raises
    ------
    RuntimeError
        If it ends early; says its last lines.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    log = out.with_suffix(".log")
    # A run of its own warms up where that is wanted: bench_serving's warm-up would leave its first prompt in the cache.
    more = ["--warmup-requests", "0", "--ready-check-timeout-sec", "0", "--disable-tqdm"]
    more += ["--output-details", "--output-file", str(out)]
    process = _CONTEXT.Process(target=_main, args=([*flags, *more], log), daemon=True)
    process.start()
    process.join()
    if process.exitcode or not out.exists():
        tail = "\n".join(log.read_text().splitlines()[-10:]) if log.exists() else ""
        raise RuntimeError(f"bench_serving ended with status {process.exitcode}; its last messages ({log}):\n{tail}")
    return json.loads(out.read_text())


def _main(flags: list[str], log: Path) -> None:
    from sglang.benchmark.serving import cli_main

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["bench_serving", *flags]
    cli_main()
