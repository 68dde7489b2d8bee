"""SGLang's scripted runtime drives an audited server step by step through the awkward moments of a request's life."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang.test.scripted_runtime import http_server

from tests.server.oracles import scheduler_scripts as scripts
from tools.soak.settings import STRICT


@pytest.fixture(scope="module")
def server(small_model: Path) -> Iterator[http_server.ScriptedHttpServer]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**STRICT, "OMP_NUM_THREADS": "1"}.items():  # the tensors are tiny
            patch.setenv(name, value)
        patch.setattr(http_server, "_launch_scripted_http_server", scripts.launch_with_plugins)
        # The scheduler leaves on request, but the process that serves HTTP waits for a signal.
        patch.setattr(http_server, "SHUTDOWN_JOIN_TIMEOUT_S", 3.0)
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
