"""The methods that are compared, as data: a name and engine flags. One that comes later is a line in `METHODS`,
or on the command line `NAME=FLAGS`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How a request's KV is read. `flags` are the engine's, beyond those of its sizes."""

    name: str
    flags: tuple[str, ...] = ()
    is_full: bool = False  # plain SGLang: no budget, no sizes
    is_window: bool = False  # sink and recent take the whole budget: nothing is selected


METHODS = {
    method.name: method
    for method in (
        Method("full", is_full=True),
        Method("window", ("--freekv-tau", "-1"), is_window=True),
        Method("exact", ("--freekv-tau", "2")),
        Method("speculation", ("--freekv-tau", "-1")),
        Method("freekv-0.9", ("--freekv-tau", "0.9")),
        Method("freekv-0.8", ("--freekv-tau", "0.8")),
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
