"""The releases of SGLang that this package is for. Under another one it keeps out of the way.

What differs between them lies in packages that have one module for each release, all with the same names, such as
``v0_5_23``: `releases`, `serving.radix_cache`, `cpu.pools`. Nothing else asks which release is installed; what a patch
is for stands beside it.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

TESTED_RELEASES = ("0.5.17", "0.5.23")  # on which the whole suite passes
# Oldest first. One that is not tested yet is refused, unless a developer names it in this variable.
WRITTEN_FOR = ("0.5.17", "0.5.23")
_ON_TRIAL = "FREEKV_TRY_SGLANG"


def is_served(release: str) -> bool:
    """Whether FreeKV is served on a release of SGLang."""
    return release in TESTED_RELEASES or (release in WRITTEN_FOR and os.environ.get(_ON_TRIAL) == release)


def is_served_release() -> bool:
    """Whether it is served on the installed one."""
    return is_served(version("sglang"))


def served_release() -> str:
    """The installed release; where nothing is written for it, it is measured by the newest for which something is."""
    return found if (found := version("sglang")) in WRITTEN_FOR else WRITTEN_FOR[-1]


def module_name(release: str) -> str:
    """Of the modules that are written for a release: ``v0_5_23``."""
    return f"v{release.replace('.', '_')}"


def module_for_release(package: str) -> ModuleType:
    """The module of a package that is written for the installed release."""
    return import_module(f"{package}.{module_name(served_release())}")
