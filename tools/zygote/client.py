"""Start Python processes that write to a log: forked where a zygote listens, with a new interpreter elsewhere."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tools.zygote.interpreter import Order, send_order

ADDRESS = "FREEKV_ZYGOTE"
_ROOT = Path(__file__).parents[2]
_UNSETTLED = ("PYTEST_", "TORCHINDUCTOR_CACHE_DIR", "CUTE_DSL_CACHE_DIR")

# Together all of SGLang that takes long to import. In some releases they import its scheduler, which reads settings of
# tests from the environment, SGLANG_TEST_RETRACT for one: a server with such a setting starts anew.
SGLANG = ("sglang.launch_server", "sglang.srt.models.registry")
SERVER_CHILDREN = 2  # of a server on one rank: a scheduler and a detokenizer


class Forked:
    """A process that the zygote has forked, with the part of `subprocess.Popen` that is used here."""

    def __init__(self, order: Order, log: IO) -> None:
        self.pid: int
        self.returncode: int | None = None
        self._zygote = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._address = os.environ[ADDRESS]
        self._zygote.connect(self._address)
        send_order(self._zygote, order, [log.fileno()] * len(order.files))
        answer = self._answer()
        if "refusal" in answer:
            raise ValueError(f"{answer['refusal']}; start this process anew, not from the zygote")
        self.pid = answer["pid"]

    def _answer(self) -> dict:
        message = self._zygote.recv(1 << 16)
        if not message:
            raise RuntimeError(f"the zygote has ended:\n{self._zygote_log()}")
        return json.loads(message)

    def _zygote_log(self) -> str:
        log = _log(self._address)
        return log.read_text() if log.exists() else ""

    def wait(self, timeout: float | None = None) -> int:
        """Exit status, negative for a signal.

        Raises
        ------
        subprocess.TimeoutExpired
            After `timeout` seconds.
        """
        if self.returncode is None:
            self._zygote.settimeout(timeout)
            try:
                self.returncode = self._answer()["returncode"]
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("a forked process", timeout or 0) from None
            self._zygote.close()
        return self.returncode

    def poll(self) -> int | None:
        """Exit status; None while the process runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None


def start(
    arguments: Sequence[str], log: Path, environment: dict[str, str], children: int, anew: bool = False
) -> subprocess.Popen | Forked:
    """Start `python ARGUMENTS` in a session of its own.

    Parameters
    ----------
    children
        Processes that it may spawn with `multiprocessing`.
    anew
        Never fork: the process is exactly a user's.

    Raises
    ------
    ValueError
        If the environment has another value for a variable that modules of the zygote have read.
    """
    with log.open("w") as out:
        if anew or ADDRESS not in os.environ:
            command = [sys.executable, *arguments]
            return subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        return Forked(Order(list(arguments), _settled(environment), os.getcwd(), (1, 2), children), out)


@contextmanager
def zygote(environment: dict[str, str], modules: Sequence[str] = SGLANG) -> Iterator[None]:
    """Until the block ends, `start` forks, in this process and in those that it starts meanwhile.

    What it forks has imported `modules`, in `environment`.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        address = Path(folder, "socket")
        listener.bind(str(address))
        listener.listen()
        command = [sys.executable, "-m", "tools.zygote", str(listener.fileno()), *modules]
        with _log(address).open("w") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_settled(environment),
                cwd=_ROOT,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # a signal to this process and its group ends this process, and so the zygote
            )
        outer = os.environ.pop(ADDRESS, None)
        os.environ[ADDRESS] = str(address)
        try:
            yield
        finally:
            del os.environ[ADDRESS]
            if outer is not None:
                os.environ[ADDRESS] = outer
            process.communicate()


def _settled(environment: dict[str, str]) -> dict[str, str]:
    """Without variables that differ from test to test: pytest's own, and those in which libraries note defaults."""
    return {name: value for name, value in environment.items() if not name.startswith(_UNSETTLED)}


def _log(address: str | Path) -> Path:
    return Path(address).with_name("log")
