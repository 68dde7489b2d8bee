"""How faults are planted in the product. A fault is a patch of the code, not of its data."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from pytest import MonkeyPatch

from freekv_kernels import REFERENCE
from sglang_freekv.memory import kv_memory


class Fault(NamedTuple):
    """What is planted, and a pattern of the messages that may report it first."""

    plant: Callable[[MonkeyPatch], None]
    found_by: str
    setup: str = "tight"

    def __str__(self) -> str:
        return self.plant.__name__


def fault(found_by: str, setup: str = "tight") -> Callable[[Callable[[MonkeyPatch], None]], Fault]:
    """Declare the function that plants a fault."""
    return lambda plant: Fault(plant, found_by, setup)


def faults_in(module: dict[str, object]) -> list[Fault]:
    return [value for value in module.values() if isinstance(value, Fault)]


def wrap(patch: MonkeyPatch, owner: type | ModuleType, name: str, faulty: Callable) -> None:
    """Replace a function by `faulty`, which gets the original first."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: faulty(original, *args, **kwargs))


def wrap_op(patch: MonkeyPatch, name: str, faulty: Callable) -> None:
    """The same for an op, in every engine that is built from now on."""
    original = getattr(REFERENCE, name)
    ops = REFERENCE._replace(**{name: lambda *args, **kwargs: faulty(original, *args, **kwargs)})
    patch.setattr(kv_memory, "REFERENCE", ops)
