"""The zygote:  python -m tools.zygote DESCRIPTOR MODULE...

It serves a listening Unix socket until its standard input closes, and imports when it is first asked. Each connection
orders one process (`interpreter.Order`), gets its pid, and its exit status when it has ended; who hangs up, ends it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import NamedTuple

import setproctitle

from tools.zygote.interpreter import Order, become, receive_order

# A forked process follows these although they were read before.
_FOLLOWED = {"PYTHONPATH"}


class Child(NamedTuple):
    pid: int
    ended: int  # pidfd: readable when the process has ended
    client: socket.socket


class Zygote:
    """Forks a process per connection, from a state in which nothing but imports has happened."""

    def __init__(self, listener: socket.socket, modules: list[str]) -> None:
        self._modules = modules
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._children: list[Child] = []
        self._imports: Imports | None = None

    def serve(self) -> None:
        """Return when standard input has closed."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin:
                    return self._kill(self._children)
                if key.fileobj is self._listener:
                    self._start(self._listener.accept()[0])
                elif key.data in self._children and key.fileobj is key.data.client:
                    self._selector.unregister(key.data.client)
                    self._kill([key.data])
                elif key.data in self._children:
                    self._report_end(key.data)

    def _start(self, client: socket.socket) -> None:
        received = receive_order(client)
        if received is None:
            return client.close()
        self._imports = self._imports or Imports(self._modules)
        order, files = received
        if refusal := self._imports.refusal(order):
            client.send(json.dumps({"refusal": refusal}).encode())
        elif pid := os.fork():
            child = Child(pid, os.pidfd_open(pid), client)
            self._children.append(child)
            self._selector.register(child.ended, selectors.EVENT_READ, child)
            self._selector.register(client, selectors.EVENT_READ, child)
            client.send(json.dumps({"pid": pid}).encode())
        else:
            os.setsid()
            self._close(client)
            become(order._replace(environment=order.environment | self._imports.set_variables), files)
        for file in files:
            os.close(file)

    def _close(self, client: socket.socket) -> None:
        """Close, in a fork, what is the zygote's."""
        self._selector.close()
        self._listener.close()
        client.close()
        for child in self._children:
            os.close(child.ended)
            child.client.close()

    def _kill(self, children: list[Child]) -> None:
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def _report_end(self, child: Child) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        with suppress(OSError):  # the client has hung up
            child.client.send(json.dumps({"returncode": status}).encode())
        self._selector.unregister(child.ended)
        with suppress(KeyError):
            self._selector.unregister(child.client)
        os.close(child.ended)
        child.client.close()
        self._children.remove(child)


class Imports:
    """Imports modules; knows which environment variables they have read and set meanwhile."""

    def __init__(self, modules: list[str]) -> None:
        self.read_variables: dict[str, str | None] = {}  # and their values
        before = dict(os.environ)
        get = os._Environ.__getitem__

        def getitem(environ: os._Environ, name: str) -> str:
            self.read_variables.setdefault(name, before.get(name))
            return get(environ, name)

        os._Environ.__getitem__ = getitem
        for module in modules:
            importlib.import_module(module)
        os._Environ.__getitem__ = get
        self.set_variables = {name: value for name, value in os.environ.items() if before.get(name) != value}
        if threading.active_count() > 1:
            raise RuntimeError(f"imports have started threads, which do not survive a fork: {threading.enumerate()}")
        setproctitle.getproctitle()  # it finds the place of the title, which it cannot in another environment
        gc.freeze()  # what is there now is garbage in no fork, and its pages stay shared

    def refusal(self, order: Order) -> str | None:
        """Why the imported modules are not those that the ordered process would have."""
        different = sorted(
            f"{name} ({order.environment.get(name)!r}, here {value!r})"
            for name, value in self.read_variables.items()
            # What the imports have set, they have set in the starting process, too, if it has imported the same.
            if name not in _FOLLOWED and order.environment.get(name) not in (value, self.set_variables.get(name, value))
        )
        return f"the zygote's modules read {', '.join(different)} when they are imported" if different else None


if __name__ == "__main__":
    Zygote(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]).serve()
