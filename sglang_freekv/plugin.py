"""SGLang's entry point: adds the flags everywhere, and everything else where a server asks for FreeKV."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    AttentionFactory = Callable[["ModelRunner"], "AttentionBackend"]

    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.model_executor.model_runner import ModelRunner

_ANNOUNCEMENT = "SGLANG_KV_RETRIEVAL"  # environment: this process serves a FreeKV server
_ATTENTION_NAMES = ("flashinfer", "torch_native")  # much of SGLang asks for these names, so they are kept


def register() -> None:
    """SGLang calls this in every process that loads plug-ins.

    It logs a plug-in's exception and goes on without it; a patch that does not fit ends the process instead.
    """
    from freekv_patches import IncompatibleSGLang, install_flags

    try:
        install_flags()
    except IncompatibleSGLang as error:
        raise SystemExit(str(error)) from None
    if os.environ.get(_ANNOUNCEMENT) == "freekv":
        activate()


@functools.cache
def activate() -> None:
    """Patch this process and register FreeKV's parts; each server's arguments decide whether it uses them."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry

    from freekv_patches import IncompatibleSGLang, assert_installed, install

    try:
        install()
        HookRegistry.apply_hooks()
        assert_installed()
    except IncompatibleSGLang as error:
        raise SystemExit(str(error)) from None
    register_radix_cache_backend("freekv", _create_radix_cache)
    for name in _ATTENTION_NAMES:
        ATTENTION_BACKENDS[name] = _attention_factory(ATTENTION_BACKENDS[name])


def patch_status() -> tuple[int, list[str]]:
    """How many places of SGLang are patched, and, in words, those that the installed release does not have so."""
    from freekv_patches import ALL_PATCHES

    return len(ALL_PATCHES), [mismatch for patch in ALL_PATCHES if (mismatch := patch.mismatch()) is not None]


def check_release() -> str | None:
    """Say why the installed SGLang is refused; None where it is not."""
    from freekv_patches.patch import IncompatibleSGLang, check_version

    try:
        check_version()
    except IncompatibleSGLang as error:
        return str(error)
    return None


@contextmanager
def announced_to_children(is_freekv: bool) -> Iterator[None]:
    """Make processes that start meanwhile activate FreeKV, or not."""
    before = os.environ.pop(_ANNOUNCEMENT, None)
    if is_freekv:
        os.environ[_ANNOUNCEMENT] = "freekv"
    try:
        yield
    finally:
        os.environ.pop(_ANNOUNCEMENT, None)
        if before is not None:
            os.environ[_ANNOUNCEMENT] = before


def _create_radix_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    from sglang_freekv.radix_cache import create_radix_cache

    return create_radix_cache(ctx)


def _attention_factory(original: AttentionFactory) -> AttentionFactory:
    """Build FreeKV's attention backend on a FreeKV server, SGLang's on a plain one."""

    def create(runner: ModelRunner) -> AttentionBackend:
        if getattr(runner.server_args, "_freekv", None) is None:
            return original(runner)
        from sglang_freekv.attention_backend import FreeKVAttentionBackend

        return FreeKVAttentionBackend(runner)

    return create
