"""Faults: what dies, dies whole and says why; nobody waits for a client that does not read, and who outgrows the host
store ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil
import pytest

from tools.servers import Server, assert_pages_are_whole, free_port, serve

FREEKV = ("--dtype", "float32", "--chunked-prefill-size", "256", "--kv-retrieval", "freekv", "--freekv-audit")
STORE_TOKENS = 1024
SMALL_STORE = ("--max-total-tokens", str(STORE_TOKENS))
NARROW = ("--freekv-budget", "128", "--freekv-sink", "32", "--freekv-recent", "32")
LONG = 900  # tokens of a generation that is interrupted
UNREAD = 128  # tokens of a stream that nobody reads: with log-probabilities, more than the kernel buffers
END_TIMEOUT_S = 60
PROMPT = list(range(50))


class Stream:
    """A streamed generation over a socket that holds little: a client that does not read soon gets no more."""

    def __init__(self, server: Server, max_new_tokens: int) -> None:
        # SGLang sends the log-probabilities of all tokens so far with each event, so little is not enough.
        logprobs = {"return_logprob": True, "top_logprobs_num": 20}
        params = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        payload = json.dumps({"input_ids": PROMPT, "stream": True, **logprobs, "sampling_params": params}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: server\r\nContent-Length: {len(payload)}\r\n"
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(END_TIMEOUT_S)
        address = urlsplit(server.url)
        self._socket.connect((address.hostname, address.port))
        self._socket.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + payload)

    def unread_bytes(self) -> int:
        """Bytes that wait in the kernel on the server's side."""
        ours = f":{self._socket.getsockname()[1]:04X}"
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(int(queues.split(":")[0], 16) for _, _, remote, _, queues, *_ in lines if remote.endswith(ours))

    def read_to_the_end(self) -> bytes:
        """Return what still comes, until the server closes the connection."""
        received = b""
        try:
            while data := self._socket.recv(1 << 16):
                received += data
        except ConnectionResetError:
            pass
        return received

    def close(self) -> None:
        self._socket.close()


def processes_of(session: int) -> list[psutil.Process]:
    """Living processes that a server has started, and itself."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass
    return found


def wait_until_all_have_ended(session: int) -> list[psutil.Process]:
    """Return the processes that are still there after a while."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while (left := processes_of(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


class Death(NamedTuple):
    """What was seen when a scheduler was killed."""

    tokens_before: list[int]
    rest_of_stream: bytes
    left: list[psutil.Process]
    log: str


@pytest.fixture(scope="module")
def death_and_next(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Death, Server]]:
    """A server dies of its scheduler; the same command, with the same port, starts the next."""
    logs, port = tmp_path_factory.mktemp("logs"), free_port()
    flags = (*FREEKV, *NARROW, *SMALL_STORE)
    with serve(model, logs / "first.log", *flags, port=port) as first:
        tokens = first.generate_one(PROMPT, 64)
        with closing(Stream(first, LONG)) as stream:
            first.wait_for_decoding(8)
            (scheduler,) = (one for one in processes_of(first.pid) if one.name().startswith("sglang::schedul"))
            scheduler.send_signal(signal.SIGKILL)
            rest = stream.read_to_the_end()
        death = Death(tokens, rest, wait_until_all_have_ended(first.pid), first.log.read_text())
    with serve(model, logs / "next.log", *flags, port=port, anew=True) as second:  # as a user's server
        yield death, second


@pytest.fixture
def death(death_and_next: tuple[Death, Server]) -> Death:
    return death_and_next[0]


@pytest.fixture
def server(death_and_next: tuple[Death, Server]) -> Server:
    """Started again after the death of the first, with an empty prefix cache."""
    death_and_next[1].flush()
    return death_and_next[1]


def test_a_killed_scheduler_ends_the_whole_server_and_the_log_names_it(death: Death):
    assert death.left == []
    assert re.search(r"Subprocess scheduler_0 \(pid=\d+\) crashed with exit code -9", death.log)


def test_a_client_of_a_server_that_dies_sees_its_stream_end_and_not_as_if_it_were_complete(death: Death):
    assert re.search(rb'"finish_reason": ?null', death.rest_of_stream)
    assert b"[DONE]" not in death.rest_of_stream


def test_the_same_command_serves_again_after_a_death(death: Death, server: Server):
    assert server.generate_one(PROMPT, 64) == death.tokens_before


def test_clients_that_stop_reading_hold_up_nobody_and_keep_no_pages(server: Server):
    alone = server.generate_one(PROMPT, 64)
    with closing(Stream(server, UNREAD)) as one, closing(Stream(server, UNREAD)) as other:
        assert server.generate_one(PROMPT, 64) == alone
        server.flush()  # once their generations have ended, unread
        assert min(one.unread_bytes(), other.unread_bytes()) > 0
        assert_pages_are_whole(server)


def test_a_client_that_stops_reading_and_goes_away_ends_its_generation(server: Server):
    start = server.freekv()["decoded_tokens"]
    with closing(Stream(server, LONG)) as stream:
        server.wait_for_decoding(32)
        assert stream.unread_bytes() > 0
    assert_pages_are_whole(server)
    assert server.freekv()["decoded_tokens"] - start < LONG


def test_a_generation_that_outgrows_the_host_store_ends_with_what_fits(server: Server):
    prompt = PROMPT * 18  # most of the store: decoding is slow
    reply = server.generate(prompt, 4 * STORE_TOKENS)
    assert reply.status == 200
    assert reply.body["meta_info"]["finish_reason"]["type"] == "length"
    assert STORE_TOKENS - 100 < len(prompt) + len(reply.body["output_ids"]) <= STORE_TOKENS
    assert_pages_are_whole(server)
