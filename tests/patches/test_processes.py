"""Processes come to FreeKV, or not: by their flags, by whoever starts them, as a tokenizer worker."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest

from freekv_patches import launch
from freekv_patches.registry import ALL_PATCHES
from tests.support.arguments import FREEKV, PLAIN
from tools.zygote.client import start

PROGRAM = """
import inspect, json, os, pathlib, pickle, pkgutil, sys

from sglang.srt import server_args
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.mem_cache.registry import registered_radix_cache_backends
from sglang.srt.plugins import load_plugins
from freekv_patches.registry import ALL_PATCHES, FLAG_PATCHES, assert_installed

def snapshot():
    targets = {}
    for each in ALL_PATCHES:
        owner, _, name = each.target.rpartition(".")
        targets[each.target] = inspect.getattr_static(pkgutil.resolve_name(owner), name)
    return targets, dict(ATTENTION_BACKENDS), registered_radix_cache_backends()

def touched():
    after, _, _ = snapshot()
    return [target for target in targets if after[target] is not targets[target]]

def resolved(argv):
    found = server_args.prepare_server_args(argv)
    if "freekv" in argv:
        arguments.write_bytes(pickle.dumps(found))
    return {name: value for name, value in vars(found).items() if name != "model_config"}

def report_worker():
    worker = pickle.loads(arguments.read_bytes()).get_tokenizer_worker_class()
    assert_installed()
    return {"touched": touched(), "worker": worker.__name__}

def report(plain_argv, flags, announced, is_tokenizer_worker):
    if is_tokenizer_worker:
        return report_worker()
    without = resolved(plain_argv)
    if announced:
        os.environ["SGLANG_KV_RETRIEVAL"] = announced
    load_plugins()
    if announced:
        assert_installed()
    first = resolved([*plain_argv[:2], *flags])
    _, backends_after, caches_after = snapshot()
    return {
        "touched": touched(),
        "backends": [name for name in backends if backends_after[name] is not backends[name]],
        "caches": sorted(set(caches_after) - set(caches)),
        "flags": [each.target for each in FLAG_PATCHES],
        "is_freekv": "_freekv" in first,
        "plain_is_unchanged": resolved(plain_argv) == without,
        "announced": os.environ.get("SGLANG_KV_RETRIEVAL"),
    }

arguments = pathlib.Path(sys.argv[1])
targets, backends, caches = snapshot()
print(json.dumps(report(**json.loads(sys.argv[2]))))
"""


class Launch(NamedTuple):
    """How a process comes to FreeKV, or not."""

    flags: tuple[str, ...] = ()
    announced: str | None = None  # by the process that started it
    is_tokenizer_worker: bool = False  # it loads no plug-ins, and unpickles the arguments of the launch before


PLAIN_LAUNCH, FREEKV_LAUNCH, CHILD = Launch(), Launch(("--kv-retrieval", "freekv")), Launch(announced="freekv")
WORKER = Launch(is_tokenizer_worker=True)


def output_of(program: str, log: Path, *arguments: str) -> str:
    """What a fresh process prints that runs `program`, in which no plug-ins are loaded."""
    environment = {name: value for name, value in os.environ.items() if name != "SGLANG_KV_RETRIEVAL"}
    process = start(["-c", program, *arguments], log, environment | {"OMP_NUM_THREADS": "1"}, children=0)
    status = process.wait(timeout=240)
    assert status == 0, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[Launch, dict]:
    """What of SGLang changed in fresh processes that load plug-ins and resolve arguments."""
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}
    (path / "config.json").write_text(json.dumps(config))
    plain_argv = ["--model-path", str(path), "--random-seed", "1"]

    def report(launch: Launch) -> dict:
        launched = json.dumps({"plain_argv": plain_argv, **launch._asdict()})
        printed = output_of(PROGRAM, path / "log", str(path / "arguments"), launched)
        return json.loads(printed.splitlines()[-1])

    return {launch: report(launch) for launch in (PLAIN_LAUNCH, FREEKV_LAUNCH, WORKER, CHILD)}


def test_without_the_flag_everything_but_the_flags_is_the_identical_object(reports):
    report = reports[PLAIN_LAUNCH]
    assert report["touched"] == report["flags"]
    assert (report["backends"], report["caches"]) == ([], [])
    assert not report["is_freekv"] and report["announced"] is None


def test_the_flags_do_not_change_what_a_plain_command_line_resolves_to(reports):
    assert reports[PLAIN_LAUNCH]["plain_is_unchanged"]


def test_with_the_flag_every_target_is_patched_and_plain_arguments_still_resolve_as_before(reports):
    report = reports[FREEKV_LAUNCH]
    assert report["touched"] == [each.target for each in ALL_PATCHES]
    assert report["caches"] == ["freekv"] and sorted(report["backends"]) == ["flashinfer", "torch_native", "triton"]
    assert report["is_freekv"] and report["plain_is_unchanged"] and report["announced"] is None


def test_a_process_that_a_freekv_server_starts_is_patched_when_it_loads_plug_ins(reports):
    report = reports[CHILD]
    assert report["touched"] == [each.target for each in ALL_PATCHES]
    assert not report["is_freekv"]


def test_an_extra_tokenizer_process_is_patched_before_it_takes_requests(reports):
    assert reports[WORKER] == {"touched": [each.target for each in ALL_PATCHES], "worker": "TokenizerWorker"}


@pytest.mark.parametrize(("server_args", "announced"), [(FREEKV, "freekv"), (PLAIN, None)])
@pytest.mark.parametrize("before", [None, "freekv"])
def test_children_are_told_while_they_start_and_only_then(server_args, announced, before, monkeypatch):
    monkeypatch.setenv("SGLANG_KV_RETRIEVAL", before or "")
    if before is None:
        monkeypatch.delenv("SGLANG_KV_RETRIEVAL")

    def original(cls, server_args):
        assert os.environ.get("SGLANG_KV_RETRIEVAL") == announced
        raise InterruptedError  # a start-up that fails leaves nothing behind either

    with pytest.raises(InterruptedError):
        launch.launch_subprocesses(original, object, server_args)
    assert os.environ.get("SGLANG_KV_RETRIEVAL") == before


def test_models_that_are_loaded_before_and_after_see_the_patched_function(tmp_path):
    program = """
import sys
from sglang.srt.models import gpt_oss
from freekv_patches import plugin
plugin.activate()
import sglang.srt.models
sys.modules.pop("sglang.srt.models.qwen3_moe", None)  # as if nothing had loaded it yet
vars(sglang.srt.models).pop("qwen3_moe", None)
from sglang.srt.models import qwen3_moe, utils
assert utils.enable_fused_set_kv_buffer is gpt_oss.enable_fused_set_kv_buffer is qwen3_moe.enable_fused_set_kv_buffer
assert hasattr(utils.enable_fused_set_kv_buffer, "__wrapped__")
"""
    output_of(program, tmp_path / "log")
