"""What SGLang's oracles share: a model that is cheap to run, and strict memory checks in every server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.soak.settings import MODEL


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint of two layers."""
    out = tmp_path_factory.mktemp("small_model")
    MODEL.write(out)
    return out
