"""Folders with a config.json and no weights, as the doctor needs no more of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from sglang_freekv.doctor.__main__ import main

CONFIGS = json.loads((Path(__file__).parent / "model_configs.json").read_text())


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a model of model_configs.json, by its name there."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> str:
        path = root / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(CONFIGS[name]))
        return str(path)

    return folder


@pytest.fixture
def diagnose(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run the doctor on a command line; its exit status and report."""

    def run(*argv: str) -> tuple[int, str]:
        status = main(list(argv))
        return status, capsys.readouterr().out

    return run


@pytest.fixture(autouse=True)
def unchanged_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """To resolve arguments deals cores to ranks, in the environment; servers of other tests must not inherit them."""
    # Not before SGLang, which asks this module for the platform while it is imported.
    from sglang_freekv.cpu.platform import CpuPlatform

    monkeypatch.setattr(CpuPlatform, "_dealt_cores", None)
    with mock.patch.dict(os.environ):
        yield
