"""A SGLang server as a child process that a benchmark can freeze while another one is measured."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import requests

from tools.zygote.client import SERVER_CHILDREN, start

_START_SECONDS = 900
_ANSWER_SECONDS = 1800


class Chunk(NamedTuple):
    """One message of a stream."""

    seconds: float  # on the client's clock, when it arrived
    request: int  # index in the batch
    tokens: int  # generated for this request so far
    output_ids: list[int]  # as the server sends them: so far, or with --incremental-streaming-output the new ones


class Server:
    """`python -m sglang.launch_server` with the given flags, from construction until `stop`.

    Its messages go to `log`. All its processes freeze and thaw together (SIGSTOP, SIGCONT): requests in flight
    wait, connections stay open.
    """

    def __init__(self, name: str, flags: list[str], log: Path) -> None:
        self.name = name
        self.log = log
        self.url = f"http://127.0.0.1:{_free_port()}"
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["-m", "sglang.launch_server", "--port", self.url.rpartition(":")[2], *flags]
        self._process = start(arguments, log, dict(os.environ), SERVER_CHILDREN)
        try:
            self._wait_until_ready()
        except BaseException:  # ended while it waits: nobody else can stop this server
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with suppress(requests.ConnectionError):
                if requests.get(f"{self.url}/health", timeout=60).ok:
                    return
            time.sleep(0.5)
        raise RuntimeError(f"the server {self.name!r} did not start; its last messages ({self.log}):\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-20:])

    def _processes(self) -> list[psutil.Process]:
        if self._process.poll() is not None:
            return []
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def poll(self) -> int | None:
        """Exit status; None while it runs."""
        return self._process.poll()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Let a frozen server run for a while."""
        self.thaw()
        try:
            yield
        finally:
            self.freeze()

    def stop(self) -> None:
        """End every process of the server."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        for process in self._processes():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def info(self) -> dict:
        """Settings and state, as `/server_info` gives them."""
        return requests.get(f"{self.url}/server_info", timeout=60).json()

    def freekv(self) -> dict | None:
        """FreeKV's counters and sizes; None where the server is plain SGLang."""
        return self.info()["internal_states"][0].get("freekv")

    def flush_cache(self) -> None:
        """Empty the prefix cache, once the requests before have left."""
        requests.post(f"{self.url}/flush_cache", params={"timeout": 60}, timeout=120).raise_for_status()

    def stream(self, prompts: list[list[int]], sampling: dict | list[dict], **fields: Any) -> Iterator[Chunk]:
        """Send a batch, return its chunks as they arrive.

        Parameters
        ----------
        sampling : dict, or one for each prompt
            SGLang's sampling parameters.
        fields
            More of the request's body.

        Raises
        ------
        RuntimeError
            If the server refuses a request; says what the server said.
        """
        body = {"input_ids": prompts, "sampling_params": sampling, "stream": True, **fields}
        response = requests.post(f"{self.url}/generate", json=body, stream=True, timeout=_ANSWER_SECONDS)
        if not response.ok:
            raise RuntimeError(f"the server {self.name!r} answered {response.status_code}: {response.text}")
        lines = (line for line in response.iter_lines() if line.startswith(b"data: {"))
        return (_chunk(json.loads(line[len(b"data: ") :])) for line in lines)


def retrieval_numbers(before: dict, after: dict) -> dict[str, tuple[float, str]]:
    """What retrieval did between two answers of `Server.freekv`, as value and unit.

    Bytes are per generated token: those that were copied from the host store, and those of all selected pages, which
    would have been copied if nothing had stayed on the device. The first selection after a prompt is among them.
    """
    names = ("recalled_bytes", "decoded_tokens", "rows", "flagged_rows", "hits", "misses", "absent_pages")
    count = {name: after[name] - before[name] for name in names}
    tokens, selected = max(1, count["decoded_tokens"]), count["hits"] + count["misses"]
    return {
        "recalled_per_token": (count["recalled_bytes"] / tokens, "bytes"),
        "selected_per_token": (selected * after["block_bytes"] / tokens, "bytes"),
        "hit_share": (count["hits"] / max(1, selected), "ratio"),
        "corrected_rows": (count["flagged_rows"] / max(1, count["rows"]), "ratio"),
        "absent_pages": (count["absent_pages"], "pages"),
    }


def device_bytes_per_request(freekv: dict, context: int) -> tuple[float, float]:
    """Device bytes of a request of `context` tokens: both windows and what pages are scored by; its complete KV."""
    per_token = (freekv["page_summaries_bytes"] + freekv["block_table_bytes"]) / freekv["host_tokens"]
    return freekv["device_bytes_per_request"] + per_token * context, freekv["full_kv_bytes_per_token"] * context


def _chunk(message: dict) -> Chunk:
    if "error" in message:
        raise RuntimeError(f"the server refused a request: {message['error']}")
    tokens = message["meta_info"]["completion_tokens"]
    return Chunk(time.perf_counter(), message.get("index", 0), tokens, message["output_ids"])


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
