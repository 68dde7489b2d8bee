"""What a patch is, and how patches are checked and put into SGLang's hook registry: all of them, or none.

SGLang logs and ignores a hook that it cannot apply, and another plug-in may have taken a target before.
Either would leave a server without FreeKV, or with half of it; so signatures are compared before, and
wrappers after.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_freekv.tested_release import TESTED_SGLANG

if TYPE_CHECKING:
    from sglang_freekv.config import FreeKVConfig


class IncompatibleSGLang(RuntimeError):
    """This SGLang is not the one that the patches were written against."""


@dataclass(frozen=True)
class Patch:
    """One hook on one callable of SGLang."""

    target: str  # dotted path
    kind: HookType
    hook: Callable[..., Any]
    signature: str  # str(inspect.signature) it was written against; a final "..." is any rest
    reason: str  # why no registry or subclass does it
    remove_when: str  # the upstream event that makes it unnecessary

    def find(self) -> Callable[..., Any]:
        """Return the target's function, without its classmethod or staticmethod.

        Raises
        ------
        AttributeError, ImportError
            If SGLang has no such target.
        """
        owner_path, _, name = self.target.rpartition(".")
        owner = pkgutil.resolve_name(owner_path)
        attribute = inspect.getattr_static(owner, name)
        return attribute.__func__ if isinstance(attribute, (classmethod, staticmethod)) else attribute

    def mismatch(self) -> str | None:
        """Say how the target differs from the recorded one; None where it does not."""
        try:
            found = str(inspect.signature(self.find()))
        except (AttributeError, ImportError, TypeError, ValueError) as error:  # gone, or nothing to call
            return f"{self.target}: expected {self.signature}, found nothing ({error})"
        prefix = self.signature.removesuffix("...")
        matches = found.startswith(prefix) if prefix != self.signature else found == self.signature
        return None if matches else f"{self.target}: expected {self.signature}, found {found}"

    def is_applied(self) -> bool:
        """Whether the target carries this hook: one of the wrappers around the original calls it."""
        function = self.find()
        while hasattr(function, "__wrapped__"):
            if inspect.getclosurevars(function).nonlocals.get("hook") is self.hook:
                return True
            function = function.__wrapped__
        return False


def freekv_config(server_args: Any) -> FreeKVConfig | None:
    """Return what `--kv-retrieval freekv` attached to SGLang's arguments; None on a plain server."""
    return getattr(server_args, "_freekv", None)


def check_version() -> None:
    """Raise IncompatibleSGLang where the installed release was not tested."""
    found = version("sglang")
    if found not in TESTED_SGLANG:
        raise IncompatibleSGLang(
            f"FreeKV works with sglang{TESTED_SGLANG}, found {found}; install that, or remove --kv-retrieval."
        )


def install(patches: Iterable[Patch]) -> None:
    """Register every patch's hook, or none.

    The hooks take effect with the next `HookRegistry.apply_hooks()`. A hook that is registered already stays.

    Raises
    ------
    IncompatibleSGLang
        If a target is missing or its signature is not the recorded one; lists all such targets.
    """
    patches = tuple(patches)
    mismatches = [mismatch for patch in patches if (mismatch := patch.mismatch()) is not None]
    if mismatches:
        raise IncompatibleSGLang("\n  ".join(["FreeKV's patches do not fit this SGLang:", *mismatches]))
    for patch in patches:
        registered = HookRegistry._hooks.get(patch.target, ())
        if all(hook is not patch.hook for _, hook, _ in registered):
            HookRegistry.register(patch.target, patch.hook, patch.kind)


def check_applied(patches: Iterable[Patch]) -> None:
    """Raise IncompatibleSGLang listing the patches whose target does not carry the hook."""
    missing = [patch.target for patch in patches if not patch.is_applied()]
    if missing:
        headline = "FreeKV's patches are not in place; does another plug-in hook these? (see SGLANG_PLUGINS)"
        raise IncompatibleSGLang("\n  ".join([headline, *missing]))
