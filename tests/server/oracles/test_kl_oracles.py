"""SGLang's own oracles of KV integrity: decoding, with and without cache hits, must agree with a fresh prefill.

Requests are retracted and prefilled again all the time (SGLANG_TEST_RETRACT), on an audited server. A test plug-in can
break this server; the last tests of the file use it, to show what the oracles and the audit notice.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sglang.test import kl_test_utils

from tests.server.oracles import faults
from tools.servers import Server, random_prompt, serve
from tools.soak.settings import STRICT

# In nats per token. Float32 rounding gives 5e-12 with this model, wrong values 3 and more.
_MAX_KL = 1e-6
_MAX_NEW_TOKENS = 40
_PROMPT_TOKENS = (1, 31, 33, 127, 256, 257, 400, 513, 640, 700)

_ORACLES = {
    "decode_agrees_with_prefill": kl_test_utils.test_input_output_logprobs_match_helper,
    "prefill_hit_agrees_with_prefill": kl_test_utils.test_input_output_logprobs_match_prefill_cache_hit_helper,
    "decode_hit_agrees_with_prefill": kl_test_utils.test_input_output_logprobs_match_decode_cache_hit_helper,
}


@pytest.fixture(scope="module")
def server_and_fault(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server, and the file that says what it does wrong now: see `faults`."""
    folder = tmp_path_factory.mktemp("kl_oracles")
    fault, broken = faults.environment(folder / "plugin")
    flags = "--kv-retrieval freekv --dtype float32 --chunked-prefill-size 256 --max-total-tokens 16384 --freekv-audit"
    flags = (*flags.split(), "--enable-metrics")
    env = STRICT | broken | {"SGLANG_TEST_RETRACT": "1"}
    with serve(small_model, folder / "log", *flags, env=env, anew=True) as server:  # it may be read at import
        yield server, fault


@pytest.fixture
def server(server_and_fault: tuple[Server, Path]) -> Server:
    return server_and_fault[0]


@pytest.fixture
def fault(server_and_fault: tuple[Server, Path]) -> Path:
    return server_and_fault[1]


@pytest.fixture
def compare(server: Server, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Run one of SGLang's helpers on prompts of ours; they would be downloaded otherwise."""
    rng = random.Random(0)
    prompts = [random_prompt(rng, n) for n in _PROMPT_TOKENS]
    monkeypatch.setattr(kl_test_utils, "get_input_ids", lambda **_: prompts)
    model = str(small_model)
    thresholds = {model: {"kl_div": _MAX_KL}}

    def run(oracle: Callable) -> None:
        oracle(server.url, thresholds, model, max_samples=len(prompts), max_new_tokens=_MAX_NEW_TOKENS)

    return run


@pytest.mark.parametrize("oracle", _ORACLES.values(), ids=_ORACLES)
def test_kl(oracle: Callable, compare: Callable[[Callable], None], server: Server) -> None:
    compare(oracle)
    assert "retracted_reqs" in server.log.read_text()


@pytest.mark.parametrize("oracle", _ORACLES.values(), ids=_ORACLES)
def test_wrong_bytes_in_the_host_store_are_noticed(oracle: Callable, compare: Callable, fault: Path) -> None:
    fault.write_text(faults.STORE)
    with pytest.raises(AssertionError, match=r"avg_kl_div=.* > threshold"):
        compare(oracle)
    fault.write_text("")


def test_a_device_block_that_differs_from_its_host_page_turns_an_audited_server_red_and_ends_it(
    server: Server, fault: Path
) -> None:
    server.flush()
    assert server.generate([1] * 100).status == 200
    assert server.request("/health").status == 200
    fault.write_text(faults.BLOCK)
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(server.generate, [2] * 100)
        deadline = time.monotonic() + 30
        while "FreeKV's audit failed: layer 0: block" not in server.log.read_text():
            assert time.monotonic() < deadline, server.log.read_text()[-4000:]
            time.sleep(0.2)
        time.sleep(1)  # until the signal has arrived
        assert server.request("/health").status == 503
        assert server.metrics()["sglang:freekv_audit_failures_total"] == 1
        with pytest.raises(OSError):  # the server hangs up, without a token of this step
            answer.result()
    assert server.process.wait() == -signal.SIGKILL
