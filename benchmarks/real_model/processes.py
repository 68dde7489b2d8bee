"""A generator in a process of its own, as SGLang keeps settings and a model for the whole of a process."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def run_in_process(generate: Callable[..., Iterator[T]], *args: object) -> Iterator[T]:
    """Yield what `generate(*args)` yields in a new process; what libraries print there is not shown.

    Raises
    ------
    RuntimeError
        With the traceback, or the exit status, where it failed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_generate, args=(sender, generate, args), daemon=False)
    process.start()
    sender.close()
    try:
        while (item := _receive(receiver, process)) is not None:
            yield item
        process.join()
    finally:
        process.kill()
        process.join()


def _receive(receiver: Connection, process) -> object:
    try:
        item = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a process of the benchmark ended with status {process.exitcode}") from None
    if isinstance(item, _Failure):
        raise RuntimeError(f"a process of the benchmark failed:\n{item.text}")
    return item


def _generate(sender: Connection, generate: Callable[..., Iterator[object]], args: tuple) -> None:
    """In the new process: send every item, and None behind the last."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, sys.stdout.fileno())
    os.dup2(silent, sys.stderr.fileno())
    try:
        for item in generate(*args):
            sender.send(item)
        sender.send(None)
    except BaseException:
        sender.send(_Failure(traceback.format_exc()))
