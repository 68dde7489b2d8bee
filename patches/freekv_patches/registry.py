"""All patches, and how they are put in: the flags everywhere, the rest where a server asks for FreeKV."""

from __future__ import annotations

from collections.abc import Callable

from freekv_patches import endpoints, launch, memory, metrics, requests, runner, scheduler, server_args
from freekv_patches.patch import Patch, check_applied, check_version
from freekv_patches.patch import install as install_patches

# The flags have to exist before anyone can ask for FreeKV: in every process that loads plug-ins.
FLAG_PATCHES: tuple[Patch, ...] = server_args.PATCHES

# Everything else waits until a server asks for FreeKV.
RUNTIME_PATCHES: tuple[Patch, ...] = (
    *launch.PATCHES,
    *requests.PATCHES,
    *endpoints.PATCHES,
    *memory.PATCHES,
    *runner.PATCHES,
    *scheduler.PATCHES,
    *metrics.PATCHES,
)

ALL_PATCHES: tuple[Patch, ...] = FLAG_PATCHES + RUNTIME_PATCHES


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
