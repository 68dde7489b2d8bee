"""Start real SGLang servers on this machine and talk to them."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.zygote.client import SERVER_CHILDREN, Forked, start

START_TIMEOUT_S = 240


@dataclass(frozen=True)
class Reply:
    """An HTTP answer: status code and decoded JSON, or text where it is none."""

    status: int
    body: Any


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen | Forked  # that has started the others

    @property
    def pid(self) -> int:
        return self.process.pid

    def request(self, path: str, body: dict | None = None, timeout_s: float = 120) -> Reply:
        """GET `path`, or POST `body` to it."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return Reply(answer.status, _decode(answer.read()))
        except urllib.error.HTTPError as error:
            return Reply(error.code, _decode(error.read()))

    def generate(self, input_ids: list, max_new_tokens: int = 64, **sampling_params) -> Reply:
        """Greedy generation for one prompt (token ids), or for a list of prompts that arrive together.

        With `ignore_eos`, so that exactly `max_new_tokens` come back.
        """
        params = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True, **sampling_params}
        return self.request("/generate", {"input_ids": input_ids, "sampling_params": params})

    def generate_one(self, prompt: list[int], max_new_tokens: int = 64, **sampling_params) -> list[int]:
        """Output token ids."""
        return self.generate_all([prompt], max_new_tokens, **sampling_params)[0]

    def generate_all(self, prompts: list[list[int]], max_new_tokens: int = 64, **sampling_params) -> list[list[int]]:
        """Output token ids of prompts sent at the same time."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            replies = list(pool.map(lambda ids: self.generate(ids, max_new_tokens, **sampling_params), prompts))
        failed = [reply for reply in replies if reply.status != 200]
        assert not failed, failed[0]
        return [reply.body["output_ids"] for reply in replies]

    def metrics(self) -> dict[str, float]:
        """Values under /metrics by name, summed over their labels."""
        values: dict[str, float] = {}
        for line in self.request("/metrics").body.splitlines():
            if not line.startswith("#"):
                name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
                values[name] = values.get(name, 0) + float(value)
        return values

    def freekv(self) -> dict[str, int]:
        """Counters and sizes that the server publishes under /server_info."""
        return self.request("/server_info").body["internal_states"][0]["freekv"]

    def wait_for_decoding(self, num_tokens: int, timeout_s: float = 60) -> None:
        """Return once `num_tokens` more tokens have been decoded than now."""
        goal = self.freekv()["decoded_tokens"] + num_tokens
        deadline = time.monotonic() + timeout_s
        while self.freekv()["decoded_tokens"] < goal:
            assert time.monotonic() < deadline, f"the server does not decode:\n{self.log.read_text()[-4000:]}"

    def flush(self) -> None:
        """Empty the prefix cache, once the server is idle."""
        deadline = time.monotonic() + 60
        while self.request("/flush_cache", {}).status != 200:
            assert time.monotonic() < deadline, "the server does not become idle"
            time.sleep(0.2)


def random_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Token ids of random bytes."""
    return [rng.randrange(256) for _ in range(num_tokens)]


def assert_pages_are_whole(server: Server) -> None:
    """Every page of the host store is back: the prefix cache can be emptied, and the longest request fits."""
    server.flush()
    state = server.freekv()
    assert state["tree_tokens"] == 0
    assert len(server.generate_one([1] * (state["host_tokens"] - 64), 3)) == 3  # SGLang keeps two pages back


def _decode(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    model: Path, log: Path, port: int, *flags: str, env: dict[str, str] | None = None, anew: bool = False
) -> subprocess.Popen | Forked:
    """Start ``python -m sglang.launch_server`` in a session of its own, forked where a zygote is and not `anew`."""
    arguments = ["-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port)]
    # Servers of one test run share the cores; more threads would only wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return start(
        [*arguments, "--max-running-requests", "64", "--sleep-on-idle", *flags], log, environment, SERVER_CHILDREN, anew
    )


@contextmanager
def serve(
    model: Path,
    log: Path,
    *flags: str,
    env: dict[str, str] | None = None,
    port: int | None = None,
    anew: bool = False,
) -> Iterator[Server]:
    """Run a server with `flags` until the block ends.

    Raises
    ------
    AssertionError
        If the server does not become healthy; shows the end of its log.
    """
    port = port or free_port()
    process = launch(model, log, port, *flags, env=env, anew=anew)
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait_until_healthy(server, process)
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen | Forked) -> None:
    """End a server that `launch` has started, and whatever is left of it."""
    with suppress(ProcessLookupError):  # it has ended by itself, and none of its processes is left
        os.killpg(process.pid, signal.SIGKILL)  # at once: a graceful end takes seconds, and nothing is to be saved
    process.wait()


def _wait_until_healthy(server: Server, process: subprocess.Popen | Forked) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if server.request("/health", timeout_s=10).status == 200:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()[-4000:]}")
