"""All patches, and how they are put in: the flags everywhere, the rest where a server asks for FreeKV."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from freekv_patches import endpoints, launch, memory, metrics, requests, runner, scheduler, server_args
from freekv_patches.patch import Patch, check_applied, check_version
from freekv_patches.patch import install as install_patches
from sglang_freekv.tested_release import served_release

# The flags have to exist before anyone can ask for FreeKV: in every process that loads plug-ins.
_OF_FLAGS = (server_args,)
# Everything else waits until a server asks for FreeKV.
_OF_A_SERVER = (launch, requests, endpoints, memory, runner, scheduler, metrics)


def patches_for(release: str, modules: tuple[ModuleType, ...] = (*_OF_FLAGS, *_OF_A_SERVER)) -> tuple[Patch, ...]:
    """The patches that are for a release."""
    patches = (patch for module in modules for patch in module.PATCHES)
    return tuple(patch for patch in patches if patch.signature_in(release) is not None)


FLAG_PATCHES = patches_for(served_release(), _OF_FLAGS)
ALL_PATCHES = patches_for(served_release())


def install_flags(when_asked_for: Callable[[], None]) -> None:
    """Register the hooks that add the command line flags and `sgl.Engine` keywords.

    Parameters
    ----------
    when_asked_for
        Called where arguments ask for FreeKV: the plug-in's activation.
    """
    server_args.activate = when_asked_for
    install_patches(FLAG_PATCHES)


def install() -> None:
    """Register every hook, on a tested SGLang only; see `freekv_patches.patch.install`."""
    check_version()
    install_patches(ALL_PATCHES)


def assert_installed() -> None:
    """Raise IncompatibleSGLang unless every target carries its hook."""
    check_applied(ALL_PATCHES)


def patch_status() -> tuple[int, list[str]]:
    """How many places of SGLang are patched, and, in words, those that the installed release does not have so."""
    return len(ALL_PATCHES), [mismatch for patch in ALL_PATCHES if (mismatch := patch.mismatch()) is not None]
