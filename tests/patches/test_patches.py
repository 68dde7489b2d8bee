"""Patches: they fit this SGLang, they go in all or none, and a plain server does not get them."""

from __future__ import annotations

import dataclasses
import sys
import types
from importlib import import_module

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from freekv_patches import patch, plugin, registry
from freekv_patches.patch import IncompatibleSGLang, Patch, check_applied, check_version, install
from freekv_patches.registry import ALL_PATCHES
from sglang_freekv import tested_release


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


@pytest.mark.parametrize("found", ["0.5.16", "0.5.18", "0.5.17.post1", "0.5.22", "0.5.23.post1", "0.5.24"])
def test_a_release_that_was_not_tested_is_refused_with_a_sentence(found, monkeypatch):
    monkeypatch.setattr(patch, "version", lambda name: found)
    monkeypatch.delenv("FREEKV_TRY_SGLANG", raising=False)
    with pytest.raises(IncompatibleSGLang, match=f"sglang 0.5.17 or 0.5.23, found {found}; install one of them"):
        check_version()


def test_a_release_that_this_is_written_for_and_not_tested_on_is_served_where_a_developer_names_it(monkeypatch):
    monkeypatch.setattr(tested_release, "TESTED_RELEASES", ("0.5.17",))
    monkeypatch.setattr(patch, "version", lambda name: "0.5.23")
    monkeypatch.delenv("FREEKV_TRY_SGLANG", raising=False)
    with pytest.raises(IncompatibleSGLang):
        check_version()
    monkeypatch.setenv("FREEKV_TRY_SGLANG", "0.5.23")
    check_version()
    for name, found in (("0.5.20", "0.5.23"), ("0.5.22", "0.5.22")):
        monkeypatch.setenv("FREEKV_TRY_SGLANG", name)
        monkeypatch.setattr(patch, "version", lambda name, found=found: found)
        with pytest.raises(IncompatibleSGLang):
            check_version()


@pytest.fixture
def foreign_release(monkeypatch):
    """Another SGLang is installed, and nobody has set the environment of a FreeKV server."""
    monkeypatch.setattr(patch, "version", lambda name: "0.5.20")
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
    assert "works with sglang 0.5.17 or 0.5.23, found 0.5.20" in record.getMessage() and record.levelname == "WARNING"
    monkeypatch.setattr(plugin.multiprocessing, "parent_process", lambda: "the server")
    plugin.register()  # its children say nothing
    assert len(caplog.records) == 1
    assert foreign_release == []


@pytest.mark.usefixtures("foreign_release")
@pytest.mark.parametrize("flag", ["--kv-retrieval", "--kv-retrieval=freekv", "--freekv-budget=2048"])
def test_beside_another_release_a_server_that_asks_for_freekv_is_refused_with_a_sentence(flag, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch_server.py", "--model-path", "m", flag])
    refusal = r"^error: FreeKV works with sglang 0\.5\.17 or 0\.5\.23, found 0\.5\.20; install one of them"
    with pytest.raises(SystemExit, match=refusal):
        plugin.register()


@pytest.mark.usefixtures("foreign_release")
def test_beside_another_release_a_child_of_a_freekv_server_ends(monkeypatch):
    monkeypatch.setenv("SGLANG_KV_RETRIEVAL", "freekv")
    with pytest.raises(SystemExit, match=r"found 0\.5\.20"):
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
