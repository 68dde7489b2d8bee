"""The suites' own code: wheels from the package index, in a folder of their own and never in the environment."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from benchmarks.records import ROOT

BUILD = ROOT / "build" / "suites"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_SIZE_MB = 43  # of the wheels
_RUN_SECONDS = 3600


class NotInstalled(RuntimeError):
    """The packages cannot be had; the message says why, and what to do."""


class Failed(RuntimeError):
    """A program of a suite ended early; the message has its last lines."""


def packages(folder: Path = BUILD) -> Path:
    """Return the folder that holds the suites' packages; pip installs them first, once for each list of requirements.

    pip compares every wheel with its checksum. The folder is made beside its place and renamed, so it is complete.

    Raises
    ------
    NotInstalled
        If pip does not get them, or gets other files.
    """
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    place = folder / f"packages-{digest}"
    if place.exists():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    unfinished, log = folder / "unfinished", folder / "pip.log"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    print(f"suites: fetching their packages once, {_SIZE_MB} MB with pip into {os.path.relpath(place)}", flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off"]
    what = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(REQUIREMENTS)]
    with log.open("w") as output:
        done = subprocess.run([*pip, *what, "--target", str(unfinished)], stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise NotInstalled(_why(log))
    unfinished.rename(place)
    return place


def _why(log: Path) -> str:
    messages, where = log.read_text(), f"its messages: {os.path.relpath(log)}"
    if "DO NOT MATCH THE HASHES" in messages:
        return (
            f"the package index gave another file than {REQUIREMENTS.name} expects ({where}); it is not used. Ask who "
            f"runs the index, or name another in PIP_INDEX_URL"
        )
    return (
        f"pip did not get the suites' packages from the package index ({where}); start again with a network, or name "
        f"another index in PIP_INDEX_URL. The parts `agentic` and `kits` need none of them"
    )


def environment(place: Path) -> dict[str, str]:
    """Environment of a suite's programs: they find their packages and NLTK's sentence model, and ask no hub."""
    path = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "PYTHONPATH": path.rstrip(os.pathsep),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # they start `python`
        "NLTK_DATA": str(place / "llama_index/core/_static/nltk_cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run(command: list[str], log: Path, env: dict[str, str], statuses: tuple[int, ...] = (0,)) -> None:
    """Run `python COMMAND` in the folder of `log`, which gets its messages; nothing that it starts outlives it.

    Parameters
    ----------
    statuses : tuple of int
        Exit statuses of a run that has come to its end.

    Raises
    ------
    Failed
        If it ends otherwise, or not within an hour: RULER's client asks again for ever where a server refuses.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        status = process.wait(_RUN_SECONDS)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        with suppress(ProcessLookupError):  # none is left
            os.killpg(process.pid, signal.SIGKILL)
    if status not in statuses:
        how = f"did not end in {_RUN_SECONDS} s" if status is None else f"ended with status {status}"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
        raise Failed(f"{' '.join(command[:3])} {how}; its last messages ({log}):\n{tail}")
