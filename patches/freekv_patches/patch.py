"""What a patch is, and how patches are checked and put into SGLang's hook registry: all of them, or none.

SGLang logs and ignores a hook that it cannot apply, and another plug-in may have taken a target before.
Either would leave a server without FreeKV, or with half of it; so signatures are compared before, and
wrappers after.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_freekv.tested_release import TESTED_RELEASES, is_served, served_release

if TYPE_CHECKING:
    from sglang_freekv.config import FreeKVConfig


class IncompatibleSGLang(RuntimeError):
    """This SGLang is not one that the patches were written against."""


@dataclass(frozen=True)
class Patch:
    """One hook on one callable of SGLang, in every release that this package is written for, or in those that it names.

    `signature` is the ``str(inspect.signature)`` that the hook was written against; a final "..." is any rest. Where
    releases differ it is a mapping from each release that the patch is for.
    """

    target: str  # dotted path
    kind: HookType
    hook: Callable[..., Any]
    signature: str | Mapping[str, str]
    reason: str  # why no registry or subclass does it
    remove_when: str  # the upstream event that makes it unnecessary

    def signature_in(self, release: str) -> str | None:
        """What the target is in a release; None where the patch is not for it."""
        return self.signature if isinstance(self.signature, str) else self.signature.get(release)

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
        expected = self.signature_in(served_release())
        try:
            found = str(inspect.signature(self.find()))
        except (AttributeError, ImportError, TypeError, ValueError) as error:  # gone, or nothing to call
            return f"{self.target}: expected {expected}, found nothing ({error})"
        prefix = expected.removesuffix("...")
        matches = found.startswith(prefix) if prefix != expected else found == expected
        return None if matches else f"{self.target}: expected {expected}, found {found}"

    def register(self) -> None:
        """Hand the hook to SGLang, once; `HookRegistry.apply_hooks` puts it in."""
        registered = HookRegistry._hooks.get(self.target, ())
        if all(hook is not self.hook for _, hook, _ in registered):
            HookRegistry.register(self.target, self.hook, self.kind)

    def is_applied(self) -> bool:
        """Whether the target carries this hook: one of the wrappers around the original calls it."""
        function = self.find()
        while hasattr(function, "__wrapped__"):
            if inspect.getclosurevars(function).nonlocals.get("hook") is self.hook:
                return True
            function = function.__wrapped__
        return False


class Attribute(Patch):
    """A class that SGLang keeps as an attribute of another, to be called with arguments: the hook is called around it.

    Its signature is the name of that class. SGLang's registry replaces a class wherever it is imported, and wraps none,
    so it is not used.
    """

    def mismatch(self) -> str | None:
        expected = self.signature_in(served_release())
        try:
            found = self._original().__name__
        except (AttributeError, ImportError) as error:
            return f"{self.target}: expected {expected}, found nothing ({error})"
        return None if found == expected else f"{self.target}: expected {expected}, found {found}"

    def register(self) -> None:
        owner_path, _, name = self.target.rpartition(".")
        hooked = partial(self.hook, self._original())
        setattr(pkgutil.resolve_name(owner_path), name, staticmethod(hooked))

    def is_applied(self) -> bool:
        return getattr(self.find(), "func", None) is self.hook

    def _original(self) -> type:
        found = self.find()
        return found.args[0] if self.is_applied() else found


def freekv_config(server_args: Any) -> FreeKVConfig | None:
    """Return what `--kv-retrieval freekv` attached to SGLang's arguments; None on a plain server."""
    return getattr(server_args, "_freekv", None)


def check_version() -> None:
    """Raise IncompatibleSGLang where the installed release was not tested."""
    if not is_served(found := version("sglang")):
        raise IncompatibleSGLang(
            f"FreeKV works with sglang {' or '.join(TESTED_RELEASES)}, found {found}; install one of them, "
            f"or remove --kv-retrieval."
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
        patch.register()


def check_applied(patches: Iterable[Patch]) -> None:
    """Raise IncompatibleSGLang listing the patches whose target does not carry the hook."""
    missing = [patch.target for patch in patches if not patch.is_applied()]
    if missing:
        headline = "FreeKV's patches are not in place; does another plug-in hook these? (see SGLANG_PLUGINS)"
        raise IncompatibleSGLang("\n  ".join([headline, *missing]))
