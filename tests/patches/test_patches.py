"""Patches: they fit this SGLang, they go in all or none, and a plain server does not get them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from freekv_patches import launch, memory, patch, plugin, registry, requests, runner, scheduler
from freekv_patches.patch import IncompatibleSGLang, Patch, check_applied, check_version, install
from freekv_patches.registry import ALL_PATCHES
from sglang_freekv.config import FreeKVConfig, UnsupportedConfiguration
from tools.zygote.client import start

PLAIN = types.SimpleNamespace()  # arguments of a plain server
FREEKV = types.SimpleNamespace(_freekv=FreeKVConfig())


@pytest.mark.parametrize("each", ALL_PATCHES, ids=lambda each: each.target.rpartition("srt.")[2])
def test_every_patch_fits_this_sglang_and_says_why_it_exists(each):
    assert each.mismatch() is None
    assert each.reason and each.remove_when
    assert each.kind is not HookType.REPLACE


def test_no_target_is_patched_twice():
    assert len({each.target for each in ALL_PATCHES}) == len(ALL_PATCHES)


@pytest.fixture
def upstream(monkeypatch):
    """A module that stands for SGLang, with one target of each sort."""

    class Server:
        def method(self, x):
            return ("method", x)

        @classmethod
        def of_class(cls, x):
            return (cls, x)

        @staticmethod
        def static(x):
            return ("static", x)

    def function(x):
        return ("function", x)

    module = types.ModuleType("upstream")
    module.Server, module.function = Server, function
    monkeypatch.setitem(sys.modules, "upstream", module)
    # What SGLang's registry holds for these targets is forgotten afterwards.
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list, HookRegistry._hooks))
    monkeypatch.setattr(HookRegistry, "_patched", set(HookRegistry._patched))
    return module


def around(target: str, signature: str) -> Patch:
    def hook(original, *args):
        return ("hooked", original(*args))

    return Patch(f"upstream.{target}", HookType.AROUND, hook, signature, reason="test", remove_when="test")


def test_functions_and_all_sorts_of_methods_are_patched_and_found_patched(upstream):
    patches = [
        around("function", "(x)"),
        around("Server.method", "(self, x)"),
        around("Server.of_class", "(cls, x)"),
        around("Server.static", "(x)"),
    ]
    with pytest.raises(IncompatibleSGLang, match=r"(?s)not in place.*upstream.function.*Server.static"):
        check_applied(patches)
    install(patches)
    install(patches)  # once is enough
    HookRegistry.apply_hooks()
    check_applied(patches)
    assert upstream.function(1) == ("hooked", ("function", 1))
    assert upstream.Server().method(1) == ("hooked", ("method", 1))
    assert upstream.Server.of_class(1) == ("hooked", (upstream.Server, 1))
    assert upstream.Server.static(1) == ("hooked", ("static", 1))
    assert all(each.mismatch() is None for each in patches)  # a patched target still shows its own signature


def test_one_changed_target_keeps_every_hook_out_and_is_named_with_both_signatures(upstream):
    patches = [
        around("function", "(x)"),
        around("Server.method", "(self, x, y)"),
        around("Server.gone", "(self)"),
        around("elsewhere.function", "()"),
    ]
    with pytest.raises(IncompatibleSGLang) as error:
        install(patches)
    message = str(error.value)
    assert "upstream.Server.method: expected (self, x, y), found (self, x)" in message
    assert "upstream.Server.gone: expected (self), found nothing" in message
    assert "upstream.elsewhere.function: expected (), found nothing" in message
    assert "upstream.function" not in message
    HookRegistry.apply_hooks()
    assert upstream.function(1) == ("function", 1)


def test_a_signature_may_be_recorded_by_its_beginning(upstream):
    assert around("Server.method", "(self, ...").mismatch() is None
    assert around("Server.method", "(self, y...").mismatch() is not None


def test_a_target_that_another_plug_in_took_first_is_noticed(upstream):
    HookRegistry.register("upstream.function", lambda result, x: None, HookType.AFTER)
    HookRegistry.apply_hooks()
    ours = [around("function", "(x)")]
    install(ours)
    HookRegistry.apply_hooks()
    assert upstream.function(1) == ("function", 1)
    with pytest.raises(IncompatibleSGLang, match=r"another plug-in.*\n.*upstream.function"):
        check_applied(ours)


def test_a_changed_signature_ends_the_process_and_not_just_the_plug_in(monkeypatch):
    changed = dataclasses.replace(registry.FLAG_PATCHES[0], signature="(parser, changed)")
    monkeypatch.setattr(registry, "FLAG_PATCHES", (changed,))
    with pytest.raises(SystemExit, match=r"add_cli_args: expected \(parser, changed\), found \(parser: "):
        plugin.register()


@pytest.mark.parametrize("found", ["0.5.16", "0.5.18", "0.5.17.post1"])
def test_a_release_that_was_not_tested_is_refused_with_a_sentence(found, monkeypatch):
    monkeypatch.setattr(patch, "version", lambda name: found)
    with pytest.raises(IncompatibleSGLang, match=f"works with sglang==0.5.17, found {found}; install"):
        check_version()


@pytest.fixture
def foreign_release(monkeypatch):
    """Another SGLang is installed, and nobody has set the environment of a FreeKV server."""
    monkeypatch.setattr(patch, "version", lambda name: "0.5.23")
    monkeypatch.delenv("SGLANG_KV_RETRIEVAL", raising=False)
    touched = []
    monkeypatch.setattr(registry, "install_flags", touched.append)
    return touched


def test_beside_another_release_a_plain_server_starts_with_one_warning_that_names_both(
    foreign_release, monkeypatch, caplog
):
    monkeypatch.setattr(sys, "argv", ["sglang", "serve", "--model-path", "m"])
    plugin.register()
    (record,) = caplog.records
    assert "works with sglang==0.5.17, found 0.5.23" in record.getMessage() and record.levelname == "WARNING"
    monkeypatch.setattr(plugin.multiprocessing, "parent_process", lambda: "the server")
    plugin.register()  # its children say nothing
    assert len(caplog.records) == 1
    assert foreign_release == []


@pytest.mark.usefixtures("foreign_release")
@pytest.mark.parametrize("flag", ["--kv-retrieval", "--kv-retrieval=freekv", "--freekv-budget=2048"])
def test_beside_another_release_a_server_that_asks_for_freekv_is_refused_with_a_sentence(flag, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch_server.py", "--model-path", "m", flag])
    with pytest.raises(SystemExit, match=r"^error: FreeKV works with sglang==0\.5\.17, found 0\.5\.23; install that"):
        plugin.register()


@pytest.mark.usefixtures("foreign_release")
def test_beside_another_release_a_child_of_a_freekv_server_ends(monkeypatch):
    monkeypatch.setenv("SGLANG_KV_RETRIEVAL", "freekv")
    with pytest.raises(SystemExit, match=r"found 0\.5\.23"):
        plugin.register()


def test_the_table_lists_every_target_and_fails_with_one_that_does_not_fit(monkeypatch, capsys):
    main = import_module("freekv_patches.__main__")
    assert main.main() == 0
    printed = capsys.readouterr().out
    assert all(each.target in printed and each.reason in printed for each in ALL_PATCHES)
    changed = dataclasses.replace(ALL_PATCHES[0], signature="()")
    monkeypatch.setattr(main, "ALL_PATCHES", (changed, *ALL_PATCHES[1:]))
    assert main.main() == 1
    assert "expected ()" in capsys.readouterr().err


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
    assert report["caches"] == ["freekv"] and sorted(report["backends"]) == ["flashinfer", "torch_native"]
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


def refuse_with(error: Exception):
    def original(self, server_args):
        raise error

    return original


@pytest.fixture
def signals(monkeypatch) -> list[int]:
    """What the process that has started this one is sent."""
    sent: list[int] = []
    parent = types.SimpleNamespace(send_signal=sent.append)
    monkeypatch.setattr(scheduler.psutil, "Process", lambda: types.SimpleNamespace(parent=lambda: parent))
    return sent


@pytest.mark.parametrize("refusal", [MemoryError("1 TiB, lower it"), UnsupportedConfiguration("1 TiB, lower it")])
def test_a_scheduler_that_is_refused_its_memory_says_one_sentence_and_ends_the_server(refusal, signals, caplog):
    with pytest.raises(SystemExit) as end:
        scheduler.start_scheduler(refuse_with(refusal), object(), FREEKV)
    assert (end.value.code, signals) == (1, [signal.SIGQUIT])
    (record,) = caplog.records
    assert record.getMessage() == "The server cannot start. 1 TiB, lower it"
    assert record.exc_info is None


@pytest.mark.parametrize(("error", "server_args"), [(RuntimeError("a bug"), FREEKV), (MemoryError("SGLang's"), PLAIN)])
def test_every_other_failure_of_a_scheduler_is_left_to_sglang(error, server_args, signals):
    with pytest.raises(type(error)) as raised:
        scheduler.start_scheduler(refuse_with(error), object(), server_args)
    assert raised.value is error
    assert not signals


def tokenizer_manager(server_args: types.SimpleNamespace, enable_lora: bool = False) -> types.SimpleNamespace:
    server_args = types.SimpleNamespace(**vars(server_args), enable_lora=enable_lora, enable_metrics=False)
    return types.SimpleNamespace(server_args=server_args, model_config=types.SimpleNamespace(vocab_size=256))


def test_a_request_is_checked_on_a_freekv_server_and_passed_on_a_plain_one():
    bad = types.SimpleNamespace(sampling_params={"custom_params": {"freekv_budget": 5}})
    with pytest.raises(ValueError, match="freekv_budget is 5"):
        requests.check_request(tokenizer_manager(FREEKV), bad, [1, 2])
    assert requests.check_request(tokenizer_manager(PLAIN), bad, [1, 2]) is None
    unset = types.SimpleNamespace(sampling_params=None)
    assert requests.check_request(tokenizer_manager(FREEKV), unset, [0, 255]) is None
    assert requests.check_request(tokenizer_manager(FREEKV), unset, None) is None  # embeddings instead of tokens


@pytest.mark.parametrize("token", [256, -1, 1 << 70])
def test_a_token_that_the_model_does_not_have_is_refused(token):
    request = types.SimpleNamespace(sampling_params=None)
    with pytest.raises(ValueError, match=r"input_ids contains .*; give tokens of the vocabulary, 0 to 255\."):
        requests.check_request(tokenizer_manager(FREEKV), request, [1, token])
    assert requests.check_request(tokenizer_manager(PLAIN), request, [1, token]) is None
    assert requests.check_request(tokenizer_manager(FREEKV, enable_lora=True), request, [1, token]) is None


class QueuedRequest:
    """SGLang's request as its scheduler puts it into the queue."""

    def __init__(self, custom_params=None, tokens=(1, 2)):
        self.sampling_params = types.SimpleNamespace(custom_params=custom_params)
        self.origin_input_ids_unpadded, self.input_embeds, self.error = tokens, [[0.5]], None

    def set_finish_with_abort(self, error):
        self.error = error


WRONG_AT_THE_SCHEDULER = {
    "custom_params.freekv_budget is 100": QueuedRequest({"freekv_budget": 100}),
    "the unknown key 'freekv_budgets'": QueuedRequest({"freekv_budgets": 128}),
    "freekv_dump needs a server started with --freekv-debug-dump": QueuedRequest({"freekv_dump": True}),
    "input_ids contains 256": QueuedRequest(tokens=(1, 256)),
}


@pytest.mark.parametrize("error", WRONG_AT_THE_SCHEDULER)
def test_the_scheduler_finishes_a_request_that_does_not_fit_with_an_error_and_reads_no_more_of_it(error):
    req = WRONG_AT_THE_SCHEDULER[error]
    assert requests.check_queued_request(tokenizer_manager(PLAIN), req) is None and req.error is None
    assert requests.check_queued_request(tokenizer_manager(FREEKV), req) is None
    assert error in req.error
    assert req.sampling_params.custom_params is req.input_embeds is None


def test_the_scheduler_passes_on_a_request_that_fits_and_what_it_has_retracted():
    fits, retracted = QueuedRequest({"freekv_budget": 512, "another": 1}), QueuedRequest({"freekv_budget": 100})
    requests.check_queued_request(tokenizer_manager(FREEKV), fits)
    requests.check_queued_request(tokenizer_manager(FREEKV), retracted, is_retracted=True)
    assert fits.error is retracted.error is None
    assert fits.sampling_params.custom_params == {"freekv_budget": 512, "another": 1}


def test_a_plain_server_in_a_patched_process_gets_the_attention_of_sglang():
    factory = plugin._attention_factory(lambda runner: ("original", runner))
    runner = types.SimpleNamespace(server_args=PLAIN)
    assert factory(runner) == ("original", runner)


@pytest.mark.parametrize("is_freekv", [True, False])
def test_models_do_not_write_to_a_pool_that_has_no_token_major_buffer(is_freekv, monkeypatch):
    from sglang.srt.model_executor import forward_context

    from sglang_freekv.serving.kv_pool import FreeKVPool

    pool = object.__new__(FreeKVPool) if is_freekv else object()
    monkeypatch.setattr(forward_context, "get_token_to_kv_pool", lambda: pool)
    assert runner.enable_fused_set_kv_buffer(lambda forward_batch: True, "batch") is not is_freekv


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


@pytest.mark.parametrize("disable_radix_cache", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 2048])
def test_the_cache_of_either_sort_releases_the_host_store_when_the_scheduler_ends(disable_radix_cache, chunk_size):
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from sglang_freekv.serving.radix_cache import create_radix_cache

    released = []
    memory = types.SimpleNamespace(unpin=lambda: released.append(True))
    pool = types.SimpleNamespace(memory=memory)
    allocator = types.SimpleNamespace(get_kvcache=lambda: pool, device="cpu")
    params = CacheInitParams(
        disable=disable_radix_cache, req_to_token_pool=None, token_to_kv_pool_allocator=allocator, page_size=32
    )
    cache = create_radix_cache(
        types.SimpleNamespace(
            disable_radix_cache=disable_radix_cache, effective_chunked_prefill_size=chunk_size, params=params
        )
    )
    ending = types.SimpleNamespace(hisparse_coordinator=None, decode_offload_manager=None, tree_cache=cache)
    Scheduler.release_host_resources(ending)
    assert released == [True]
    assert cache.disable is disable_radix_cache
    assert cache.report() == {"tree_tokens": 0, "tree_protected_tokens": 0, "tree_evicted_tokens": 0}


def test_the_state_of_a_server_adds_up_with_a_session_that_waits_for_its_next_turn():
    pool = types.SimpleNamespace(report=lambda: {"host_tokens": 320})
    self = types.SimpleNamespace(
        server_args=FREEKV,
        token_to_kv_pool_allocator=types.SimpleNamespace(get_kvcache=lambda: pool, available_size=lambda: 128),
        tree_cache=types.SimpleNamespace(report=lambda: {"tree_tokens": 96}),
        pool_stats_observer=types.SimpleNamespace(session_held_tokens=lambda: 96),
    )
    result = types.SimpleNamespace(internal_state={})
    scheduler.report_internal_state(result, self, None)
    state = result.internal_state["freekv"]
    assert state["host_free_tokens"] + state["tree_tokens"] + state["session_tokens"] == state["host_tokens"]


def test_the_pool_is_as_wide_as_the_request_table_and_takes_the_plan_along(monkeypatch):
    from sglang_freekv.serving import kv_pool

    monkeypatch.setattr(kv_pool, "FreeKVPool", lambda *arguments: arguments)
    server_args = types.SimpleNamespace(
        _freekv=FreeKVConfig(), _freekv_plan="plan", speculative_algorithm=None, max_speculative_num_draft_tokens=None
    )
    configurator = types.SimpleNamespace(
        server_args=server_args,
        device="cuda",
        pool_page_size=32,
        model_config=types.SimpleNamespace(context_len=8192),
        layer_info=types.SimpleNamespace(start_layer=0, end_layer=32),
    )
    plan, max_context, *rest = memory.build_kv_pool(None, configurator, max_total_num_tokens=1)
    assert (plan, rest) == ("plan", ["cuda", 0, 32])
    assert max_context > 8192
    assert not hasattr(server_args, "_freekv_plan")
