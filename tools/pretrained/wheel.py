"""One wheel from the package index through pip, so that the user's own index settings hold, with progress."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LINES_EVERY_S = 15


class PipFailed(RuntimeError):
    """pip did not get it; its messages are in the log."""


@contextmanager
def alone(lock: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time; the lock ends with the process. Who has to wait is told by `say`."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is fetching it; waiting for that")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_of_a_full_disk(message: str) -> bool:
    """Whether an error says so; not every library raises an OSError then."""
    return "No space left on device" in message or "Disk quota exceeded" in message


def download_wheel(requirement: str, folder: Path, log: Path, size_mb: int) -> Path:
    """Return the wheel of `requirement`, without what it depends on, in `folder`; pip's messages go to `log`.

    Raises
    ------
    PipFailed
    OSError
        If pip finds the disk full.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--progress-bar", "off"]
    what = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    # pip writes to its temporary folder first: in ours its size can be watched, and it goes with ours.
    with log.open("w") as output:
        process = subprocess.Popen(
            [*pip, *what], stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"TMPDIR": str(folder)}
        )
    try:
        _watch(process, folder, size_mb)
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        if is_of_a_full_disk(log.read_text()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise PipFailed
    return next(folder.glob("*.whl"))


def _watch(process: subprocess.Popen, folder: Path, size_mb: int) -> None:
    """Show time and size until it ends: every second on a terminal, else a line from time to time."""
    is_terminal = sys.stderr.isatty()
    start = told = time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        if now - told >= (1 if is_terminal else _LINES_EVERY_S):
            told = now
            minutes, seconds = divmod(int(now - start), 60)
            line = f"  {minutes:02d}:{seconds:02d}  {_size_mb(folder):4d} of {size_mb} MB"
            print(line, end="\r" if is_terminal else "\n", file=sys.stderr, flush=True)
    if is_terminal and told > start:
        print(file=sys.stderr)


def _size_mb(folder: Path) -> int:
    """Size of the wheel as far as it is there; files come and go while pip works."""
    sizes = [0]
    for path in folder.rglob("*.whl"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return max(sizes) // 10**6
