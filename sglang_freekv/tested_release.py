"""The release of SGLang that this package is written against. Under another one it keeps out of the way."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

TESTED_SGLANG = SpecifierSet("==0.5.17")


def is_tested_release() -> bool:
    """Whether the installed SGLang is that release."""
    return version("sglang") in TESTED_SGLANG
