"""The releases of SGLang that this package is tested on. Under another one it keeps out of the way.

What differs between them lies in packages that have one module for each release, all with the same names, such as
``v0_5_23``: `releases`, `serving.radix_cache`, `cpu.pools`. Nothing else asks which release is installed; what a patch
is for stands beside it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from types import ModuleType

TESTED_RELEASES = ("0.5.17", "0.5.23")  # oldest first


def is_tested_release() -> bool:
    """Whether the installed SGLang is one of them."""
    return version("sglang") in TESTED_RELEASES


def served_release() -> str:
    """The installed release; where it was not tested, what is said about it is measured by the newest that was."""
    return version("sglang") if is_tested_release() else TESTED_RELEASES[-1]


def module_name(release: str) -> str:
    """Of the modules that are written for a release: ``v0_5_23``."""
    return f"v{release.replace('.', '_')}"


def module_for_release(package: str) -> ModuleType:
    """The module of a package that is written for the installed release."""
    return import_module(f"{package}.{module_name(served_release())}")
