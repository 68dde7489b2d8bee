"""Side streams: what a layer leaves to run beside the layers that follow, and beside the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A further CUDA stream. On a CPU, its work is done at once, in order.

    Fork and join are events, so a CUDA graph that captures them runs both streams side by side. Its priority is CUDA's
    lowest: a stream that is to come first must be made for that.
    """

    def __init__(self, device: str) -> None:
        self._stream = None if device == "cpu" else torch.cuda.Stream(device)
        self._is_forked = False

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What is launched inside waits for all that the current stream was given so far."""
        if self._stream is None:
            yield
            return
        self._is_forked = True
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """An event after all that the side stream was given so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """The current stream waits for what the side stream was given before `mark`."""
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)

    def keep(self, *tensors: torch.Tensor) -> None:
        """Do not reuse the memory of tensors of the current stream before the side stream has read them."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)

    def join(self) -> None:
        """The current stream waits for all that the side stream was given so far."""
        if self._is_forked:  # a graph may not wait for a stream that is not in it
            torch.cuda.current_stream().wait_stream(self._stream)
            self._is_forked = False


class SideStreams:
    """The side streams of a rank, which both phases of the engine share.

    Attributes
    ----------
    scan : SideStream
        Chooses the next step's pages, and has no part in the link: while a layer is scanned, the one before is fetched.
    fetch : SideStream
        All that touches the host store or the block tables beside the current stream, in order.
    """

    def __init__(self, device: str) -> None:
        self.scan, self.fetch = SideStream(device), SideStream(device)

    def join(self) -> None:
        """The current stream waits for all that they were given so far."""
        self.scan.join()
        self.fetch.join()
