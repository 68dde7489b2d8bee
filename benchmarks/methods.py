"""The methods that are compared, as data: a name and engine flags. One that comes later is a line in `METHODS`,
or on the command line `NAME=FLAGS`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How a request's KV is read. `flags` are the engine's, beyond those of its sizes, and win over a layout's."""

    name: str
    flags: tuple[str, ...] = ()
    is_full: bool = False  # plain SGLang: no budget, no sizes
    is_rival: bool = False  # another's, run where it is asked for
    ignores: tuple[str, ...] = ()  # fields of a layout that change nothing for it, or that its flags set


def _by(selector: str) -> tuple[str, ...]:
    """Flags of a selector that reads no codes."""
    return ("--freekv-selector", selector, "--freekv-key-bits", "0")


_BY_MASS, _BY_CODES = ("--freekv-selector", "mass"), ("--freekv-selector", "codes")
_NEVER_CORRECTS, _ALWAYS_CORRECTS = ("--freekv-tau", "-1"), ("--freekv-tau", "2")
_READS_NO_CODES = ("key_bits",)
_POOLS_ITSELF = ("pooling",)
_POOLS_NOTHING = ("key_bits", "pooling")  # all heads of a group have the same scores, or the flags say how to pool

METHODS = {
    method.name: method
    for method in (
        Method("full", is_full=True),
        Method("window", (*_by("streaming-llm"), *_NEVER_CORRECTS), ignores=_POOLS_NOTHING),
        Method("freekv", ignores=_POOLS_ITSELF),  # the defaults
        Method("exact", (*_BY_CODES, *_ALWAYS_CORRECTS)),
        Method("speculation", (*_BY_CODES, *_NEVER_CORRECTS)),
        Method("freekv-0.9", (*_BY_CODES, "--freekv-tau", "0.9")),  # the defaults until they were judged by mass
        Method("freekv-0.8", (*_BY_CODES, "--freekv-tau", "0.8")),
        Method("mass", (*_BY_MASS, "--freekv-hysteresis", "0", *_ALWAYS_CORRECTS), ignores=_POOLS_ITSELF),
        Method("mass-0.5", (*_BY_MASS, "--freekv-hysteresis", "0.5", *_ALWAYS_CORRECTS), ignores=_POOLS_ITSELF),
        # FreeKV (arXiv 2505.13109): its bounds, its pooling, and its tau for long prompts.
        Method(
            "freekv-paper",
            _by("paper"),
            is_rival=True,
            ignores=_POOLS_NOTHING,
        ),
        # Quest (arXiv 2406.10774). The paper keeps its first two layers dense, and its models share no KV heads.
        Method("quest", (*_by("min-max"), *_ALWAYS_CORRECTS), is_rival=True, ignores=_READS_NO_CODES),
        # The others say in `sglang_freekv/algorithm/baselines` where they come from and what differs.
        Method("arkvale", (*_by("arkvale"), *_ALWAYS_CORRECTS), is_rival=True, ignores=_READS_NO_CODES),
        Method("one-time", (*_by("one-time"), *_NEVER_CORRECTS), is_rival=True, ignores=_POOLS_NOTHING),
        Method("r-kv", (*_by("r-kv"), *_NEVER_CORRECTS), is_rival=True, ignores=_POOLS_NOTHING),
        Method("corm", (*_by("corm"), *_NEVER_CORRECTS), is_rival=True, ignores=_POOLS_NOTHING),
    )
}


def parse_method(text: str) -> Method:
    """Look a method up by name, or read a new one: ``"dense0=--freekv-tau 0.9 --freekv-dense-layers 0"``.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    name, is_new, flags = text.partition("=")
    if is_new:
        return Method(name, tuple(shlex.split(flags)))
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; give one of {', '.join(METHODS)}, or NAME=FLAGS for a new one")
    return METHODS[name]
