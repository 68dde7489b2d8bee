"""The word that a process which serves FreeKV gives to the processes that it starts, through the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "SGLANG_KV_RETRIEVAL"


def is_announced() -> bool:
    """Whether this process was started to serve FreeKV."""
    return os.environ.get(_VARIABLE) == "freekv"


@contextmanager
def announced_to_children(is_freekv: bool) -> Iterator[None]:
    """Make processes that start meanwhile activate FreeKV, or not."""
    before = os.environ.pop(_VARIABLE, None)
    if is_freekv:
        os.environ[_VARIABLE] = "freekv"
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
        if before is not None:
            os.environ[_VARIABLE] = before
