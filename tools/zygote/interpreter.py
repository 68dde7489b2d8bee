"""A process forked from a fresh interpreter becomes `python ARGUMENTS`, and the processes that it spawns do as well.

SGLang spawns its scheduler and detokenizer, and expects to be their parent. So a process forks those that it will need
while it is fresh itself, and they wait: what `multiprocessing` would have executed in a new interpreter, it orders from
one of them.
"""

from __future__ import annotations

import multiprocessing.util
import os
import pickle
import resource
import runpy
import socket
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_MAX_ORDER_BYTES = 1 << 17
_MAX_FILES = 64
_SPAWNED = "--multiprocessing-fork"  # the last argument of an interpreter that multiprocessing starts


class Order(NamedTuple):
    """What a process becomes."""

    arguments: list[str]  # of python: -m MODULE ..., -c CODE ... or FILE ...
    environment: dict[str, str]
    folder: str  # current directory
    files: tuple[int, ...]  # descriptors that the process has, by number, as the sender has them or wants them
    children: int = 0  # processes that it may spawn


class Fresh(NamedTuple):
    """A child that waits for its order."""

    pid: int
    socket: socket.socket


def send_order(channel: socket.socket, order: Order, files: Sequence[int]) -> None:
    """Send an order, and the open files that become its `files`."""
    socket.send_fds(channel, [pickle.dumps(order)], files)


def receive_order(channel: socket.socket) -> tuple[Order, list[int]] | None:
    """An order and its open files; None where the sender is gone."""
    message, files, _, _ = socket.recv_fds(channel, _MAX_ORDER_BYTES, _MAX_FILES)
    return (pickle.loads(message), files) if message else None


def become(order: Order, files: list[int]) -> None:
    """Run what is ordered, and end as an interpreter does that has run it. Never returns."""
    _place(files, order.files)  # before there are children: they write to the same log
    _spawn_from(_fork_fresh(order.children))
    os.chdir(order.folder)
    os.environ.clear()
    os.environ.update(order.environment)
    _reseed()
    _run(order.arguments)
    sys.exit()


def _fork_fresh(number: int) -> list[Fresh]:
    children: list[Fresh] = []
    for _ in range(number):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if pid := os.fork():
            theirs.close()
            children.append(Fresh(pid, ours))
            continue
        for sibling in children:
            sibling.socket.close()
        ours.close()
        if (received := receive_order(theirs)) is None:
            os._exit(0)  # the parent has ended
        theirs.close()
        become(*received)
    return children


def _spawn_from(children: list[Fresh]) -> None:
    """Let `multiprocessing` order from `children` what it would start a new interpreter for."""
    start_interpreter = multiprocessing.util.spawnv_passfds

    def spawnv_passfds(path: str, command: list, files: Sequence[int]) -> int:
        if command[-1] != _SPAWNED:
            return start_interpreter(path, command, files)
        if not children:
            raise RuntimeError(f"no process is left to become {command}; start this one with more children")
        child = children.pop(0)
        for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_STACK):
            resource.prlimit(child.pid, limit, resource.getrlimit(limit))
        os.sched_setaffinity(child.pid, os.sched_getaffinity(0))
        order = Order(command[command.index("-c") :], dict(os.environ), os.getcwd(), tuple(files))
        send_order(child.socket, order, files)
        child.socket.close()
        return child.pid

    multiprocessing.util.spawnv_passfds = spawnv_passfds


def _place(files: list[int], numbers: Sequence[int]) -> None:
    """Give open files the numbers that the process knows them by."""
    above = max([*files, *numbers, 2]) + 1
    moved = [os.dup2(file, above + i) for i, file in enumerate(files)]
    for file in files:
        os.close(file)
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def _reseed() -> None:
    """Two forks draw different numbers; Python's own generator sees to it itself."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()


def _run(arguments: list[str]) -> None:
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[0] = os.getcwd()
    sys.path[1:1] = [folder for folder in folders if folder not in sys.path]
    match arguments:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            sys.modules.pop(module, None)  # to a new interpreter it is __main__ only
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            sys.path[0] = ""
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), vars(main))
        case [file, *rest]:
            sys.argv = [file, *rest]
            sys.path[0] = str(Path(file).resolve().parent)
            runpy.run_path(file, run_name="__main__")
