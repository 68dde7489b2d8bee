"""The release of SGLang whose scheduler and tree the machine drives from inside."""

from __future__ import annotations

from importlib.metadata import version

_RELEASE = "0.5.17"


def obstacle() -> str | None:
    """Say why the machine does not run here; None where it does."""
    if (found := version("sglang")) == _RELEASE:
        return None
    return f"the fuzz machine drives the radix tree of SGLang {_RELEASE} from inside, and {found} has another"
