"""SGLang's scripted runtime drives an audited server step by step through the awkward moments of a request's life."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.test.scripted_runtime import http_server

from tests.server.oracles import scheduler_scripts as scripts
from tests.support.releases import of_release
from tools.servers import stop
from tools.soak.settings import STRICT
from tools.zygote.client import SERVER_CHILDREN, start

_LAUNCH = f"""
import json, sys
from {scripts.__name__} import launch_with_plugins
launch_with_plugins(**json.loads(sys.argv[1]))
"""


class ServerProcess:
    """Stands for the `multiprocessing.Process` in which the runtime would call its own launcher, without plug-ins."""

    def __init__(self, log: Path, kwargs: dict[str, Any]) -> None:
        self._log, self._kwargs = log, kwargs

    def start(self) -> None:
        path = os.pathsep.join(sys.path)  # as multiprocessing hands it on
        environment = os.environ | STRICT | of_release.INSPECTABLE_TREE
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}  # the tensors are tiny
        self._process = start(["-c", _LAUNCH, json.dumps(self._kwargs)], self._log, environment, SERVER_CHILDREN)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def join(self, timeout: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)

    def terminate(self) -> None:
        stop(self._process)


@pytest.fixture(scope="module")
def server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[http_server.ScriptedHttpServer]:
    log = tmp_path_factory.mktemp("scheduler_scripts") / "log"
    context = SimpleNamespace(Process=lambda target, kwargs, name, daemon: ServerProcess(log, kwargs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_server, "mp", SimpleNamespace(get_context=lambda method: context))
        # The scheduler leaves on request, but the process that serves HTTP waits for a signal.
        patch.setattr(http_server, "SHUTDOWN_JOIN_TIMEOUT_S", 3.0)
        try:
            server = http_server.ScriptedHttpServer.start(
                model_path=str(small_model),
                dtype="float32",
                kv_retrieval="freekv",
                freekv_audit=True,
                chunked_prefill_size=scripts.CHUNK_TOKENS,
                max_total_tokens=4096,
                max_running_requests=8,
                # SGLang's guard of its own KV pool, which is not there.
                kv_canary="none",
                kv_canary_real_data="none",
                kv_canary_sweep_interval=0,
            )
        except Exception:
            print(log.read_text()[-4000:])
            raise
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (scripts.prompt_runs_in_chunks, ()),
        (scripts.decoding_goes_on_after_anothers_chunks, ()),
        (scripts.exhausted_pages_make_requests_wait_or_retract, ()),
        (scripts.abort_in_mid_chunk, ()),
        (scripts.pause, ("in_place",)),
        (scripts.pause, ("retract",)),
        (scripts.flush_empties_the_cache, ()),
    ],
)
def test_script(server: http_server.ScriptedHttpServer, script, arguments: tuple) -> None:
    server.execute_script(script, args=arguments, timeout_s=60)
