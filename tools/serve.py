"""Start a server with KV retrieval, say what to ask it once it is ready, and end it with Ctrl-C: ``make serve``.

    python -m tools.serve --model-path MODEL --port 30000 --freekv-budget 2048

MODEL is smollm2, needle, or a folder. All flags but --model-path, --host and --port go to the server as they are.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

from tools.demos import ROOT, Demo, find, ready_text
from tools.pretrained import NotFetched

_PROGRESS_SECONDS = 10
_END_SECONDS = 60


def main(argv: list[str] | None = None) -> int:
    """Serve until the server ends or Ctrl-C; return the exit status."""
    own, flags = _parse(argv)
    if not _can_bind(own.host, own.port):
        return _fail(
            f"port {own.port} of {own.host} is taken, or no address of this machine; "
            f"end what listens there, or choose another port: make serve PORT={own.port + 1}"
        )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        model, demo = find(own.model_path)
    except NotFetched as why:
        return _fail(f"{why}. Without it: make serve MODEL=needle")
    except KeyboardInterrupt:
        return 0
    where = ["--model-path", model, "--host", own.host, "--port", str(own.port)]
    return _serve([*where, *demo.flags, *flags], demo, f"http://{own.host}:{own.port}")


def _serve(flags: list[str], demo: Demo, url: str) -> int:
    """Run a server until it ends, or is ended; return the exit status."""
    command = [sys.executable, "-m", "sglang.launch_server", "--kv-retrieval", "freekv", *flags]
    # A session of its own: a terminal sends Ctrl-C to the whole foreground, and the server would end piecemeal.
    server = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        if _wait_until_ready(server, url):
            print(ready_text(demo, url), flush=True)
            server.wait()
        return _fail("the server ended; its messages are above")
    except KeyboardInterrupt:
        print("\nmake serve: ending the server (Ctrl-C again: at once)", flush=True)
        _end(server)
        return 0
    finally:
        _kill_session(server)


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This program's own flags, and the server's."""
    parser = argparse.ArgumentParser(prog="python -m tools.serve", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model-path", default="smollm2", help="smollm2, needle, or the folder of a model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    return parser.parse_known_args(argv)


def _can_bind(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _wait_until_ready(server: subprocess.Popen, url: str) -> bool:
    """Whether it became healthy before it ended; says that it is alive while it has nothing to say itself."""
    start = told = time.monotonic()
    print("make serve: starting; loading SGLang takes up to a minute, the first time more", flush=True)
    while server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=30):
            return True
        if time.monotonic() - told >= _PROGRESS_SECONDS:
            told = time.monotonic()
            print(f"make serve: starting, {told - start:.0f} s", flush=True)
        time.sleep(1)
    return False


def _end(server: subprocess.Popen) -> None:
    """Ask the server to end and wait; a second Ctrl-C, or a minute, leaves the rest to `_kill_session`."""
    server.terminate()
    with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
        server.wait(_END_SECONDS)


def _kill_session(server: subprocess.Popen) -> None:
    """Leave no process of the server behind, nor its port taken."""
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _fail(why: str) -> int:
    print(f"make serve: {why}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
