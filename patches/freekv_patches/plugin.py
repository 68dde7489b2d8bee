"""SGLang's entry point: adds the flags everywhere, and everything else where a server asks for FreeKV."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from freekv_patches.announcement import is_announced
from sglang_freekv.config import METHOD_OPTION, OPTION_PREFIX

if TYPE_CHECKING:
    AttentionFactory = Callable[["ModelRunner"], "AttentionBackend"]

    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

# Much of SGLang asks for these names, so they are kept; the last one is for models that it serves with no other.
_ATTENTION_NAMES = ("flashinfer", "torch_native", "triton")
_OUR_FLAGS = tuple("--" + name.replace("_", "-") for name in (METHOD_OPTION, OPTION_PREFIX))


def register() -> None:
    """SGLang calls this in every process that loads plug-ins.

    It logs a plug-in's exception and goes on without it; a patch that does not fit ends the process instead. A release
    of SGLang that was not tested is left as it is, with a warning, unless the command line asks for FreeKV.
    """
    from freekv_patches.patch import IncompatibleSGLang, check_version

    try:
        check_version()
    except IncompatibleSGLang as error:
        if _asks_for_freekv(sys.argv) or is_announced():
            raise SystemExit(f"error: {error}") from None
        if multiprocessing.parent_process() is None:  # once for a server, not in each of its processes
            logger.warning("sglang-freekv is installed and not active, and this is plain SGLang: %s", error)
        return
    from freekv_patches.registry import install_flags

    try:
        install_flags(activate)
    except IncompatibleSGLang as error:
        raise SystemExit(str(error)) from None
    if is_announced():
        activate()


def _asks_for_freekv(argv: Iterable[str]) -> bool:
    """Whether a command line has a flag of ours, which SGLang would not know."""
    return any(argument.startswith(_OUR_FLAGS) for argument in argv)


@functools.cache
def activate() -> None:
    """Patch this process and register FreeKV's parts; each server's arguments decide whether it uses them."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry

    from freekv_patches.patch import IncompatibleSGLang
    from freekv_patches.registry import assert_installed, install

    try:
        install()
        HookRegistry.apply_hooks()
        assert_installed()
    except IncompatibleSGLang as error:
        raise SystemExit(str(error)) from None
    register_radix_cache_backend("freekv", _create_radix_cache)
    for name in _ATTENTION_NAMES:
        ATTENTION_BACKENDS[name] = _attention_factory(ATTENTION_BACKENDS[name])


def _create_radix_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    from sglang_freekv.serving.radix_cache import create_radix_cache

    return create_radix_cache(ctx)


def _attention_factory(original: AttentionFactory) -> AttentionFactory:
    """Build FreeKV's attention backend on a FreeKV server, SGLang's on a plain one."""

    def create(runner: ModelRunner) -> AttentionBackend:
        from freekv_patches.patch import freekv_config

        if freekv_config(runner.server_args) is None:
            return original(runner)
        from sglang_freekv.serving.attention_backend import FreeKVAttentionBackend

        return FreeKVAttentionBackend(runner)

    return create
