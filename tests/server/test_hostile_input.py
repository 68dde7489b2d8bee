"""What clients and operators get wrong, by accident or on purpose, is refused with a sentence, and serving goes on."""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_freekv.config import FreeKVConfig, UnsupportedConfiguration
from sglang_freekv.flags import add_cli_args, take_options
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.plan import plan_memory
from tools.servers import Server, random_prompt
from tools.soak.clients import assert_refused, post
from tools.soak.soak import assert_empty_after_flush
from tools.soak.wrong_requests import (
    CHAT,
    COMPLETIONS,
    CUSTOM_PARAMS,
    GENERATE,
    SGLANGS_OWN,
    WRONG,
    WrongRequest,
    chat,
    complete,
    generate,
)


@pytest.fixture(scope="module")
def servers_after(servers: dict[str, Server]) -> Iterator[dict[str, Server]]:
    """The servers; after this module FreeKV's still answers, and no page is lost."""
    narrow, prompt = servers["narrow"], random_prompt(random.Random("hostile"), 100)
    narrow.flush()
    before = narrow.generate_one(prompt, 8)
    yield servers
    narrow.flush()
    assert narrow.generate_one(prompt, 8) == before
    assert_empty_after_flush(narrow)


@pytest.mark.parametrize("request_", WRONG, ids=lambda r: r.name)
def test_a_wrong_request_is_refused_with_4xx(servers_after, request_: WrongRequest):
    assert_refused(request_.name, post(servers_after["narrow"], request_))


@pytest.mark.parametrize("request_", SGLANGS_OWN, ids=lambda r: r.name)
def test_what_sglang_gets_wrong_is_not_worse_here(servers_after, request_: WrongRequest):
    ours, plain = (post(servers_after[name], request_) for name in ("narrow", "plain"))
    assert ours.status == plain.status
    assert "Traceback" not in ours.body


_PLAIN = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=8)
_ANY = st.recursive(
    _PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6
)
_CUSTOM = st.dictionaries(
    st.sampled_from(["freekv_budget", "another", "freekv", ""]) | st.text(max_size=8), _ANY, max_size=3
)
_BODIES: dict[str, Callable[[Any], dict]] = {
    GENERATE: lambda custom: generate(sampling_params={"max_new_tokens": 1, "custom_params": custom}),
    COMPLETIONS: lambda custom: complete(max_tokens=1, custom_params=custom),
    CHAT: lambda custom: chat(max_tokens=1, custom_params=custom),
}


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(path=st.sampled_from(sorted(_BODIES)), custom=_CUSTOM | _ANY)
def test_any_custom_params_are_accepted_or_refused_and_nothing_else(servers_after, path: str, custom: Any):
    body = json.dumps(_BODIES[path](custom)).encode()
    reply = post(servers_after["narrow"], WrongRequest("any", path, body))
    if reply.status != 200:
        assert_refused(str(custom), reply)


def test_a_refusal_does_not_echo_a_megabyte(servers_after):
    for request in CUSTOM_PARAMS:
        if "a megabyte" in request.name and request.path == GENERATE:
            assert len(post(servers_after["narrow"], request).body) < 1000


def test_many_wrong_requests_at_once_leave_a_running_one_alone(servers_after, rng: random.Random):
    narrow, prompt = servers_after["narrow"], random_prompt(rng, 400)
    narrow.flush()
    alone = narrow.generate_one(prompt, 200)
    narrow.flush()
    with ThreadPoolExecutor(16) as pool:
        running = pool.submit(narrow.generate_one, prompt, 200)
        replies = list(pool.map(lambda wrong: post(narrow, wrong), CUSTOM_PARAMS))
        assert running.result() == alone
    assert all(400 <= reply.status < 500 for reply in replies)


def test_the_log_of_the_server_tells_of_no_error_of_ours(servers_after):
    log = servers_after["narrow"].log.read_text()
    assert "Scheduler hit an exception" not in log
    assert "sglang_freekv" not in "".join(log.split("Traceback")[1:])


# Flags and keywords

_NUMBERS = st.integers() | st.floats() | st.integers(-4, 200).map(lambda n: 32 * n)
_TEXTS = (
    _NUMBERS.map(str) | st.text(max_size=6) | st.sampled_from(["", "0,1", "1e400", "-inf", "nan", "0x20", "1" * 5000])
)
_KEYWORDS = [name for name in FreeKVConfig().keywords() if name != "page_size"]
_FLAGS = ["--" + name.replace("_", "-") for name in _KEYWORDS if name != "freekv_audit"]
_GEOMETRY = Geometry(num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float32)


def assert_planned_or_refused(options: dict[str, Any]) -> None:
    """Settings are refused with a sentence, or give a memory plan, or one that says what does not fit."""
    try:
        config, _ = take_options(options)
    except UnsupportedConfiguration as error:
        assert re.match(r"--\S+ is .*; give .*\.$", str(error), re.DOTALL), error
        return
    try:
        plan = plan_memory(_GEOMETRY, config, device_bytes=1 << 30, host_bytes=1 << 30, max_requests=64)
    except ValueError as error:
        assert str(error).startswith("FreeKV: "), error
    else:
        assert min(plan.num_pages, plan.num_blocks, plan.max_requests) > 0


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(given_flags=st.dictionaries(st.sampled_from(_FLAGS), _TEXTS, max_size=4))
def test_any_flags_give_a_plan_or_a_sentence(given_flags: dict[str, str]):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_cli_args(parser)
    try:
        options = vars(parser.parse_args([f"{flag}={value}" for flag, value in given_flags.items()]))
    except argparse.ArgumentError as error:  # with exit_on_error, argparse ends the process and shows it
        assert error.argument_name in given_flags
        return
    assert_planned_or_refused(options | {"kv_retrieval": "freekv"})


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(keywords=st.dictionaries(st.sampled_from(_KEYWORDS), _TEXTS | _ANY, max_size=4))
def test_any_keywords_of_the_engine_give_a_plan_or_a_sentence(keywords: dict[str, Any]):
    assert_planned_or_refused(keywords | {"kv_retrieval": "freekv"})


def test_a_flag_that_does_not_fit_ends_the_process_with_one_line(model: Path):
    flags = ["--kv-retrieval", "freekv", "--freekv-budget", "100"]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --freekv-budget is 100; give tokens, a multiple of the page")
    assert "Traceback" not in done.stdout + done.stderr
