"""Hooks on SGLang as data, one module per hooked subsystem. ``python -m freekv_patches`` prints them."""

from __future__ import annotations

from freekv_patches import launch, memory, metrics, requests, runner, scheduler, server_args
from freekv_patches.patch import IncompatibleSGLang, Patch, check_applied, check_version
from freekv_patches.patch import install as install_patches

# The flags have to exist before anyone can ask for FreeKV: in every process that loads plug-ins.
FLAG_PATCHES: tuple[Patch, ...] = server_args.PATCHES

# Everything else waits until a server asks for FreeKV.
RUNTIME_PATCHES: tuple[Patch, ...] = (
    *launch.PATCHES,
    *requests.PATCHES,
    *memory.PATCHES,
    *runner.PATCHES,
    *scheduler.PATCHES,
    *metrics.PATCHES,
)

ALL_PATCHES: tuple[Patch, ...] = FLAG_PATCHES + RUNTIME_PATCHES


def install_flags() -> None:
    """Register the hooks that add the command line flags and `sgl.Engine` keywords."""
    install_patches(FLAG_PATCHES)


def install() -> None:
    """Register every hook, on a tested SGLang only; see `freekv_patches.patch.install`."""
    check_version()
    install_patches(ALL_PATCHES)


def assert_installed() -> None:
    """Raise IncompatibleSGLang unless every target carries its hook."""
    check_applied(ALL_PATCHES)


__all__ = [
    "ALL_PATCHES",
    "FLAG_PATCHES",
    "IncompatibleSGLang",
    "assert_installed",
    "install",
    "install_flags",
]
