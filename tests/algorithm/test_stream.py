"""The side stream on stand-ins for CUDA's streams: who waits for whom."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch

from sglang_freekv.algorithm.stream import SideStream


def test_only_what_was_forked_is_waited_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose layers left no work may not wait for a stream that it does not hold."""
    current = MagicMock()
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    stream = SideStream("cuda")
    stream.join()
    current.wait_stream.assert_not_called()
    with stream.fork():
        pass
    stream.join()
    stream.join()
    current.wait_stream.assert_called_once()
